"""`RUNS.md`: registered checkpoints, caches, and every run in the log's own template."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from qat.console import duration
from qat.names import called, registered
from qat.report import generate, records
from qat.report.records import LOSSES, Record

log = logging.getLogger(__name__)

FILE = "RUNS.md"
HEADER = """\
# Run log

Generated from the runs in this folder and written anew whenever one ends: edits do not last. A run's own
words go on its command line, `run.goal="…" run.notes="…"`; `python launch.py stage=report` writes this file
and report.html."""
NOTHING = "–"
TOLD = {"checkpoint.path", "run.goal", "run.notes"}  # elsewhere in a run's entry, or in other words


def write(outputs: Path) -> Path:
    """Writes the log of all runs below `outputs`, atomically, one process at a time."""
    return generate(outputs / FILE, lambda: render(outputs))


def refresh(outputs: Path) -> None:
    """Writes the log at the end of a run, which never fails for it."""
    try:
        write(outputs)
    except OSError as error:
        log.warning("%s was not brought up to date: %s", outputs / FILE, error.strerror)


def render(outputs: Path) -> str:
    """The whole log as Markdown."""
    runs = records.runs(outputs)
    parts = [HEADER, *_checkpoints(outputs, runs), *_caches(outputs), "## Runs", *map(_run, runs)]
    return "\n\n".join(parts) + "\n"


def _checkpoints(outputs: Path, runs: list[Record]) -> Iterator[str]:
    yield "## Registered checkpoints"
    rows = [*_converted(outputs, runs), *_trained(runs)]
    yield _table(("checkpoint", "KD loss", "full KL", "bits a weight", "folder"), rows) if rows else "None yet."


def _converted(outputs: Path, runs: list[Record]) -> Iterator[list[str]]:
    """Conversions, students trained first, and pulled archives: what they say of themselves, else what a run found."""
    for place, manifest in records.manifests(outputs, "checkpoints"):
        name, own = Path(place).name, Record(outputs / place, manifest, place)
        pulled = not place.startswith("artifacts/")
        title = called(outputs / place, outputs) if pulled else str(manifest.get("name") or name)
        users = [run for run in runs if Path(run.text("paths", "conversion")).name == name]
        figures = [
            _known(own, users, *LOSSES, ("metrics", "kd_loss_initial")),
            _known(own, users, ("metrics", "after", "kl"), ("metrics", "kl_initial")),
            _known(own, users, ("bits_per_weight",), ("quant", "bits_per_weight")),
        ]
        yield [_code(title), *map(_figure, figures), f"`{place}`"]


def _known(own: Record, users: list[Record], *keys: tuple[str, ...]) -> float | None:
    """The first of these figures that a manifest has, or one of the runs that used it."""
    return next((figure for record in (own, *users) if (figure := record.first(*keys)) is not None), None)


def _trained(runs: list[Record]) -> Iterator[list[str]]:
    """The best checkpoint of each run that trained."""
    for run in runs:
        best = run.number("metrics", "kd_loss_best")
        if best is None or run.status != "complete":
            continue
        figures = [best, run.number("metrics", "kl"), run.number("quant", "bits_per_weight")]
        yield [_code(run.text("name")), *map(_figure, figures), f"`{run.place}/checkpoints/best`"]


def _caches(outputs: Path) -> Iterator[str]:
    yield "## Caches"
    rows = []
    for place, manifest in records.manifests(outputs, "caches"):
        sequences = manifest.get("sequences")
        count = sum(sequences.values()) if isinstance(sequences, dict) else NOTHING
        own = Path(place).name
        name = str(manifest.get("name") or registered(own, "cache") or own)
        rows.append([_code(name), str(count), f"{records.size(outputs / place) / 1e6:,.1f} MB", f"`{place}`"])
    yield _table(("cache", "sequences", "size", "folder"), rows) if rows else "None yet."


def _run(run: Record) -> str:
    head = " · ".join(part for part in (run.run_id, plain(run.text("name")), run.status) if part)
    lines = {
        "Goal": plain(run.text("goal")),
        "Instance": _instance(run),
        "Config": _config(run),
        "Command": _code(run.text("command")),
        "Result": _result(run),
        **_dense(run),
        "Conversion": _seconds(run, "convert_s"),
        "Notes": plain(run.text("notes")),
        "Folder": f"`{run.place}`",
    }
    return f"### {head}\n\n" + "\n".join(f"- **{name}**: {text or NOTHING}" for name, text in lines.items())


def _instance(run: Record) -> str:
    threads = run.text("environment", "threads")
    parts = [
        run.text("config", "instance", "name"),
        run.text("environment", "device"),
        run.text("environment", "machine"),
        f"{threads} threads" if threads else "",
    ]
    return plain(", ".join(part for part in parts if part))


def _config(run: Record) -> str:
    """What the log names of a configuration, and then whatever else the command line set."""
    config = run.section("config")
    if not config:
        return plain(run.text("quant", "preset"))
    start = run.text("config", "checkpoint", "path") or run.text("config", "checkpoint", "name")
    said = {group: run.text("config", group, "name") for group in ("model", "data", "cache", "quant", "mode", "loss")}
    train = run.section("config", "train")
    said = {"stage": run.text("stage"), "checkpoint": start} | said
    words = [f"{key}={value}" for key, value in said.items() if value]
    words += [f"train.{key}={train[key]}" for key in ("steps", "batch_size", "lr") if key in train]
    overrides = run.result.get("overrides")
    rest = [str(word) for word in overrides] if isinstance(overrides, list) else []
    known = {word.partition("=")[0] for word in words} | TOLD
    rest = [word for word in rest if word.lstrip("+").partition("=")[0] not in known]
    return _code(" ".join([*words, *rest]))


def _result(run: Record) -> str:
    measured = {
        "KD loss": _change(run, "kd_loss_initial", "kd_loss_final") or _figure(run.number("metrics", "kd_loss"), ""),
        "full KL": _change(run, "kl_initial", "kl") or _figure(run.number("metrics", "kl"), ""),
        "perplexity": _perplexity(run, "perplexity"),
        "perplexity of the teacher": _perplexity(run, "teacher_perplexity"),
        "same first choice": _percent(run.number("metrics", "top1_agreement")),
        "in": _seconds(run, "total_s"),
    }
    said = ", ".join(f"{name} {text}" for name, text in measured.items() if text)
    error = plain(run.text("error"))
    return f"{run.status}: {error}; {said}" if error else said


def _dense(run: Record) -> dict[str, str]:
    """What of the decoder has no table, and what that makes of the whole model; nothing where all of it has one."""
    found = run.section("quant", "dense")
    shares = {name: share for name in found if (share := run.number("quant", "dense", name)) is not None}
    if not shares:
        return {}
    named = ", ".join(f"{_code(name)} {share:.1%}" for name, share in shares.items())
    bits = run.number("quant", "model_bits_per_weight")
    whole = "" if bits is None else f"; {bits:.2f} bits a weight over the whole model"
    return {"Left dense": f"{sum(shares.values()):.1%} of the decoder's weights ({named}){whole}"}


def _change(run: Record, first: str, last: str) -> str:
    before, after = run.number("metrics", first), run.number("metrics", last)
    return f"{before:.4f} → {after:.4f}" if before is not None and after is not None else ""


def _figure(number: float | None, missing: str = NOTHING) -> str:
    return missing if number is None else f"{number:.4f}"


def _perplexity(run: Record, key: str) -> str:
    value = run.number("metrics", key)
    return "" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _seconds(run: Record, key: str) -> str:
    seconds = run.number("timing", key)
    return "" if seconds is None else duration(seconds)


def plain(text: str) -> str:
    """Someone's words as one line of Markdown that shows just these words."""
    special = re.compile(r"[\\`*\[\]<>#|~&]|(?<!\w)_|_(?!\w)")
    return special.sub(r"\\\g<0>", " ".join(text.split()))


def _code(text: str) -> str:
    """Text in one line of code, whatever backticks it holds."""
    text = " ".join(text.split())
    if not text:
        return ""
    fence = "`" * (max((len(ticks) for ticks in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
