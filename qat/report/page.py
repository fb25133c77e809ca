"""`report.html`: every run of an outputs folder on one page that needs nothing but a browser.

The page holds its data as JSON and draws it with its own script; nothing is fetched, and nothing a run
says reaches the page except as text.
"""

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from qat import records
from qat.records import Record
from qat.report import generate
from qat.report.times import conversions
from qat.shown import shown

FILE = "report.html"
POINTS = 240  # maximum points of a drawn curve; a chart cannot show more
MODELS = ("converted", "distilled", "teacher")  # what a run calls its models, and its samples too
SIDES = ("kl", "kd_loss", "perplexity", "top1_agreement")  # figures that stand side by side
DIGITS = 5  # significant digits of figures that are only drawn

# Characters that could end the script element or its line are written as JSON escapes.
ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def write(outputs: Path) -> Path:
    """Writes the page of all runs below `outputs`, atomically, one process at a time."""
    return generate(outputs / FILE, lambda: render(outputs))


def render(outputs: Path) -> str:
    """The page as HTML."""
    parts = {name: (files("qat.report") / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    page = parts["html"]
    for mark, text in (("/*css*/", parts["css"]), ("/*js*/", parts["js"]), ("/*data*/", embedded(data(outputs)))):
        before, _, after = page.partition(mark)
        page = before + text + after
    return page


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element, whatever text it holds."""
    return json.dumps(_seen(value), ensure_ascii=False, separators=(",", ":")).translate(ESCAPES)


def _seen(value: Any) -> Any:
    """The same values, every text in them as it may be seen."""
    if isinstance(value, dict):
        return {shown(key): _seen(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_seen(entry) for entry in value]
    return shown(value) if isinstance(value, str) else value


def data(outputs: Path) -> dict[str, Any]:
    """What the page shows, as JSON values."""
    runs = records.runs(outputs)
    settings = [_flat(run.section("config")) for run in runs]
    common, grounds = _common(settings), _grounds(runs)
    return {
        "outputs": outputs.resolve().name,
        "common": common,
        "runs": [_run(run, own, common, grounds) for run, own in zip(runs, settings, strict=True)],
        "conversions": _conversions(outputs, runs),
        "times": [[*times.where, times.name, times.count, times.told(), times.last] for times in conversions(outputs)],
    }


def _grounds(runs: list[Record]) -> dict[tuple[str, str], str]:
    """What a person calls each teacher and text that figures are of, as short as tells them apart."""
    called: dict[tuple[str, str], str] = {}
    for run in runs:
        teacher = run.text("measured_on", "teacher", "name") or run.ground[0]
        text = run.text("measured_on", "called") or run.ground[1]
        called.setdefault(run.ground, ", ".join(part for part in (teacher, text) if part) or "unknown text")
    often = Counter(called.values())
    return {ground: name if often[name] == 1 else f"{name} ({ground[1][:6]})" for ground, name in called.items()}


def _run(
    run: Record, settings: dict[str, Any], common: dict[str, Any], grounds: dict[tuple[str, str], str]
) -> dict[str, Any]:
    rows = records.metrics(run.folder)
    return {
        "id": run.run_id,
        "name": run.text("name") if run.is_trial else "",
        "status": run.status,
        "stage": run.text("stage"),
        "trains": run.trains,
        "ground": grounds[run.ground],
        "verdict": run.text("verdict"),
        "sweep": run.sweep,
        "place": run.place,
        "started": run.text("started"),
        "goal": run.text("goal"),
        "notes": run.text("notes"),
        "error": run.text("error"),
        "command": run.text("command"),
        "device": run.text("environment", "device"),
        "preset": run.text("quant", "preset"),
        "megabytes": None if (size := run.number("quant", "file_bytes")) is None else _short(size / 1e6),
        "model_bits": run.number("quant", "model_bits_per_weight"),
        "bits": run.number("quant", "bits_per_weight"),
        "kd0": run.number("metrics", "kd_loss_initial"),
        "kd": run.first(("metrics", "kd_loss_final"), ("metrics", "kd_loss")),
        "kl": run.number("metrics", "kl"),
        "kl0": _converted(run),
        "sides": _sides(run),
        "near": run.number("metrics", "kl_64_128"),
        "far": run.number("metrics", "kl_1024_2048"),
        "perplexity": run.number("metrics", "perplexity"),
        "agreement": run.number("metrics", "top1_agreement"),
        "speed": run.number("throughput", "tokens_per_second"),
        "seconds": run.seconds("timing", "total_s"),
        "conversion": Path(run.text("paths", "conversion")).name,
        "settings": {key: value for key, value in settings.items() if common.get(key) != value},
        "unset": [key for key in common if key not in settings] if settings else [],
        "known": bool(settings),
        "loss": _curve(rows, "loss"),
        "held_out": _curve(rows, "kd_loss"),
        "samples": records.samples(run.folder),
    }


def _converted(run: Record) -> float | None:
    """Full KL of the conversion that a run made or used; None for one that began with another checkpoint."""
    if not run.is_trial or not run.text("paths", "conversion"):
        return None
    return run.number("metrics", "kl_initial" if run.trains else "kl")


def _sides(run: Record) -> dict[str, list[float | None]]:
    """The figures of a run's models, in the order of `MODELS`: its conversion, its student and its teacher."""
    if not run.trains:
        return {}
    models = [[run.number("evaluation", "models", name, "metrics", key) for name in MODELS] for key in SIDES]
    return {key: found for key, found in zip(SIDES, models, strict=True) if any(each is not None for each in found)}


def _curve(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    """Steps and values, thinned to what can be seen; first and last always stay."""
    points = [(row["step"], row[key]) for row in rows if _numeric(row.get(key)) and _numeric(row.get("step"))]
    if len(points) > POINTS:
        places = {round(index * (len(points) - 1) / (POINTS - 1)) for index in range(POINTS)}
        points = [points[place] for place in sorted(places)]
    return [[step, _short(value)] for step, value in points]


def _conversions(outputs: Path, runs: list[Record]) -> dict[str, Any]:
    """Output errors of each conversion that a run used: for each kind of layer, from the first block to the last."""
    used = {Path(run.text("paths", "conversion")).name for run in runs}
    drawn = {}
    for place, manifest in records.manifests(outputs, "checkpoints"):
        name, figures = Path(place).name, manifest.get("figures")
        if name in used and isinstance(figures, dict):
            drawn[name] = _by_leaf(figures)
    return drawn


def _by_leaf(figures: dict[str, Any]) -> dict[str, list[float]]:
    leaves: dict[str, list[float]] = {}
    for layer, entry in figures.items():
        error = entry.get("output_error") if isinstance(entry, dict) else None
        if error is not None and _numeric(error):
            leaves.setdefault(layer.rpartition(".")[2], []).append(_short(error))
    return leaves


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`; values that are no scalars as JSON."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _common(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The commonest value of each key, so that a run needs to say only where it differs."""
    keys = dict.fromkeys(key for own in settings for key in own)
    return {key: Counter(own[key] for own in settings if key in own).most_common(1)[0][0] for key in keys}


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
