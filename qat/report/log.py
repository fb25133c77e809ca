"""`RUNS.md`: the best students, checkpoints, caches, times, and every run in the log's own template."""

import logging
from collections.abc import Iterator
from itertools import compress
from operator import itemgetter, not_
from pathlib import Path

from qat import provenance, records, tracking
from qat.console import duration
from qat.names import called, registered
from qat.records import LOSSES, Record
from qat.report import generate, looks
from qat.report.markdown import NOTHING, code, plain, table
from qat.report.times import conversions

log = logging.getLogger(__name__)

FILE = "RUNS.md"
HEADER = """\
# Run log

Generated from the runs in this folder and written anew whenever one ends: edits do not last. A run's own
words go on its command line, `run.goal="…" run.notes="…"`; `stage=report` writes this file and
report.html."""
QUALITY = ("teacher and text", "trained students", "lowest full KL", "perplexity", "of the teacher", "MB", "run")
SIZES = ("file_bytes", "model_bits_per_weight", "bits_per_weight")
TOLD = {"checkpoint.path", "run.goal", "run.notes"}  # keys shown elsewhere in a run's entry


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
    made = [run.is_trial and not run.came_to_nothing for run in runs]
    trials, others = list(compress(runs, made)), list(compress(runs, map(not_, made)))
    tables = [*_quality(runs), *_checkpoints(outputs, runs), *_caches(outputs), *_conversions(outputs)]
    parts = [HEADER, *tables, "## Runs", *map(_run, trials), *looks.table(others)]
    return "\n\n".join(parts) + "\n"


def _quality(runs: list[Record]) -> Iterator[str]:
    """The nearest student of every teacher and text, a line each: figures of two do not compare."""
    found: dict[tuple[str, str], list[tuple[float, Record]]] = {}
    for run in runs:
        if run.trains and run.status == "complete" and (kl := run.number("metrics", "kl")) is not None:
            found.setdefault(run.ground, []).append((kl, run))
    if found:
        yield "## Quality"
        yield table(QUALITY, [_nearest(students) for students in found.values()])


def _nearest(students: list[tuple[float, Record]]) -> list[str]:
    """The student of lowest full KL, in the columns of `QUALITY`."""
    _, best = min(students, key=itemgetter(0))
    teacher = best.text("measured_on", "teacher", "name") or best.ground[0]
    text = best.text("measured_on", "called") or best.ground[1]
    figures = [
        str(len(students)),
        _change(best, "kl_initial", "kl") or _figure(best.number("metrics", "kl")),
        _perplexity(best, "perplexity") or NOTHING,
        _perplexity(best, "teacher_perplexity") or NOTHING,
        _sizes([best.number("quant", name) for name in SIZES])[0],
    ]
    where = f"{plain(best.run_id)} {code(best.text('quant', 'preset'))}".strip()
    return [plain(", ".join(part for part in (teacher, text) if part)) or NOTHING, *figures, where]


def _checkpoints(outputs: Path, runs: list[Record]) -> Iterator[str]:
    yield "## Registered checkpoints"
    rows = [*_converted(outputs, runs), *_trained(runs)]
    header = ("checkpoint", "KD loss", "full KL", "MB", "bits a weight", "of quantized layers", "folder")
    yield table(header, rows) if rows else "None yet."


def _converted(outputs: Path, runs: list[Record]) -> Iterator[list[str]]:
    """Conversions, students trained first, and pulled archives: what they say of themselves, else what a run found."""
    for place, manifest in records.manifests(outputs, "checkpoints"):
        name, own = Path(place).name, Record(outputs / place, manifest, place)
        pulled = not place.startswith("artifacts/")
        title = called(outputs / place, outputs) if pulled else own.text("name") or name
        users = [run for run in runs if Path(run.text("paths", "conversion")).name == name]
        figures = [
            _known(own, users, *LOSSES, ("metrics", "kd_loss_initial")),
            _known(own, users, ("metrics", "after", "kl"), ("metrics", "kl_initial")),
        ]
        sizes = [_known(own, users, (name,), ("quant", name)) for name in SIZES]
        yield [code(title), *map(_figure, figures), *_sizes(sizes), code(place)]


def _known(own: Record, users: list[Record], *keys: tuple[str, ...]) -> float | None:
    """The first of these figures that a manifest has, or one of the runs that used it."""
    return next((figure for record in (own, *users) if (figure := record.first(*keys)) is not None), None)


def _trained(runs: list[Record]) -> Iterator[list[str]]:
    """The best checkpoint of each run that trained."""
    for run in runs:
        best = run.number("metrics", "kd_loss_best")
        if best is None or run.status != "complete":
            continue
        figures, sizes = [best, run.number("metrics", "kl")], [run.number("quant", name) for name in SIZES]
        yield [code(run.text("name")), *map(_figure, figures), *_sizes(sizes), code(f"{run.place}/checkpoints/best")]


def _sizes(figures: list[float | None]) -> list[str]:
    """Megabytes of the packed file and two bits a weight, as `SIZES` has them."""
    size, *bits = figures
    megabytes = NOTHING if size is None else f"{size / 1e6:.1f}"
    return [megabytes, *(NOTHING if one is None else f"{one:.2f}" for one in bits)]


def _caches(outputs: Path) -> Iterator[str]:
    yield "## Caches"
    rows = []
    for place, manifest in records.manifests(outputs, "caches"):
        own = Record(outputs / place, manifest, place)
        counts = [own.number("sequences", split) for split in own.section("sequences")]
        count = f"{sum(number or 0 for number in counts):.0f}" if counts else NOTHING
        folder = Path(place).name
        name = own.text("name") or registered(folder, "cache") or folder
        rows.append([code(name), count, f"{records.size(outputs / place) / 1e6:,.1f} MB", code(place)])
    yield table(("cache", "sequences", "size", "folder"), rows) if rows else "None yet."


def _conversions(outputs: Path) -> Iterator[str]:
    """How long conversions took, by instance and cores."""
    rows = []
    for times in conversions(outputs):
        where = [plain(part) or NOTHING for part in times.where]
        rows.append([*where, str(times.count), times.told() or NOTHING, plain(times.last) or NOTHING, code(times.name)])
    if rows:
        yield "## Conversion times"
        yield table(("instance", "device", "cores", "made", "time", "last", "conversion"), rows)


def _run(run: Record) -> str:
    parts = (plain(run.run_id), plain(run.text("name") or run.text("stage")), run.status)
    head = " · ".join(part for part in parts if part)
    lines = {
        "Goal": plain(run.text("goal")),
        "Instance": _instance(run),
        "Config": _config(run),
        "Command": code(run.text("command")),
        "Result": _result(run),
        "Measured on": _ground(run),
        **_size(run),
        **_rounded(run),
        **_dense(run),
        "Conversion": _conversion(run),
        "Resumed": _resumed(run),
        "Notes": plain(run.text("notes")),
        **_offline(run),
        "Folder": code(run.place),
    }
    lines = {name: text for name, text in lines.items() if text or name not in ("Measured on", "Resumed")}
    return f"### {head}\n\n" + "\n".join(f"- **{name}**: {text or NOTHING}" for name, text in lines.items())


def _instance(run: Record) -> str:
    threads = run.text("environment", "threads")
    parts = [
        run.text("environment", "instance") or run.text("config", "instance", "name"),
        run.text("environment", "device"),
        run.text("environment", "machine"),
        f"{threads} thread{'s' if threads != '1' else ''}" if threads else "",
    ]
    return plain(", ".join(part for part in parts if part))


def _config(run: Record) -> str:
    """The settings that the log names, followed by all others that the command line set."""
    config = run.section("config")
    if not config:
        return plain(run.text("quant", "preset"))
    start = run.text("config", "checkpoint", "path") or run.text("config", "checkpoint", "name")
    groups = ("model", "teacher", "data", "cache", "quant", "mode", "loss")
    said = {group: run.text("config", group, "name") for group in groups}
    train = run.section("config", "train")
    said = {"stage": run.text("stage"), "checkpoint": start} | said
    words = [f"{key}={value}" for key, value in said.items() if value]
    words += [f"train.{key}={train[key]}" for key in ("steps", "batch_size", "lr") if key in train]
    overrides = run.result.get("overrides")
    rest = [str(word) for word in overrides] if isinstance(overrides, list) else []
    known = {word.partition("=")[0] for word in words} | TOLD
    rest = [word for word in rest if word.lstrip("+").partition("=")[0] not in known]
    return code(" ".join([*words, *rest]))


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
    verdict, error = plain(run.text("verdict")), plain(run.text("error"))
    said = "; ".join(part for part in (f"**{verdict}**" if verdict else "", said) if part)
    return f"{run.status}: {error}; {said}" if error else said


def _size(run: Record) -> dict[str, str]:
    """The size of the whole student; empty if an older run did not record it."""
    sizes = [run.number("quant", name) for name in SIZES]
    units = ("MB packed", "bits a weight", "over the quantized layers")
    known = [f"{text} {unit}" for text, unit in zip(_sizes(sizes), units, strict=True) if text != NOTHING]
    return {"Size": ", ".join(known)} if sizes[1] is not None else {}


def _rounded(run: Record) -> dict[str, str]:
    """What only the packed file has in few bits; empty if there is nothing."""
    found = run.section("quant", "rounded")
    bits = {name: number for name in found if (number := run.number("quant", "rounded", name)) is not None}
    named = ", ".join(f"{code(name)} {number:.2f} bits" for name, number in bits.items())
    return {"Rounded in the packed file": named} if named else {}


def _dense(run: Record) -> dict[str, str]:
    """The parts of the decoder that are not quantized; empty if there are none."""
    found = run.section("quant", "dense")
    shares = {name: share for name in found if (share := run.number("quant", "dense", name)) is not None}
    if not shares:
        return {}
    named = ", ".join(f"{code(name)} {share:.1%}" for name, share in shares.items())
    return {"Left dense": f"{sum(shares.values()):.1%} of the decoder's weights ({named})"}


def _ground(run: Record) -> str:
    teacher, text = run.text("measured_on", "teacher", "name"), run.text("measured_on", "called")
    return plain(f"{teacher}, {text} ({run.text('measured_on', 'text')})") if text else ""


def _conversion(run: Record) -> str:
    """How long it took in this run, or for one that was there: when it was made, and in which time."""
    made = run.section("reused", "convert", "made")
    return f"reused, {plain(provenance.told(made))}" if run.section("reused", "convert") else _seconds(run, "convert_s")


def _resumed(run: Record) -> str:
    times = run.result.get("resumed")
    if not (isinstance(times, list) and times and isinstance(times[-1], dict)):
        return ""
    often = "once" if len(times) == 1 else f"{len(times)} times, last"
    return f"{often} {plain(str(times[-1].get('started', '')))} by {code(str(times[-1].get('command', '')))}"


def _offline(run: Record) -> dict[str, str]:
    """How to send what wandb kept of a run; empty where there is nothing to send."""
    copies = [Path(run.place, "wandb", path.name) for path in tracking.offline(run.folder)]
    how = f"to send it, {tracking.LOGIN}, then, in this folder, {code(tracking.sync(copies))}"
    return {"wandb": f"kept offline; {how}"} if copies else {}


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
    seconds = run.seconds("timing", key)
    return "" if seconds is None else duration(seconds)
