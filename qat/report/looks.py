"""What made no student, in the run log a line each: caches, evaluations, exports, and runs that came to nothing."""

import re
from collections.abc import Iterator

from qat.console import duration
from qat.records import Record
from qat.report.markdown import NOTHING, code, plain
from qat.report.markdown import table as rendered

FIGURES = {"kl": "full KL", "kd_loss": "KD loss", "perplexity": "perplexity"}
BAND = re.compile(r"kl_(\d{1,9})_(\d{1,9})")  # names of figures of KL by position
HEADER = ("run", "stage", "status", "of", "result", "time", "folder")


def table(runs: list[Record]) -> Iterator[str]:
    """Their section of the log; empty if there are none."""
    if runs:
        yield "## Caches, evaluations, exports and what came to nothing"
        yield rendered(HEADER, list(map(_row, runs)))


def _row(run: Record) -> list[str]:
    seconds = run.seconds("timing", "total_s")
    told = {"evaluate": _evaluation, "export": _export}.get(run.text("stage"), _cache)
    result = plain(run.text("error")) if run.status != "complete" else told(run)
    time = NOTHING if seconds is None else duration(seconds)
    who = [plain(run.run_id), plain(run.text("stage")), run.status]
    return [*who, _subject(run), result or NOTHING, time, code(run.place)]


def _subject(run: Record) -> str:
    """The cache, checkpoint or model that the run looked at."""
    models = run.section("evaluation", "models")
    checkpoint = run.text("config", "checkpoint", "path") or run.text("config", "checkpoint", "name")
    preset = run.text("quant", "preset") if run.is_trial else ""
    return plain(", ".join(models) or " ".join(part for part in (checkpoint, preset) if part))


def _evaluation(run: Record) -> str:
    found = {name: run.number("metrics", key) for key, name in FIGURES.items()}
    figures = [f"{name} {value:.4f}" for name, value in found.items() if value is not None]
    figures += [f"KL at {place} {value:.4f}" for place, value in _by_position(run)]
    share = run.number("metrics", "greedy_ended")
    figures += [] if share is None else [f"{share:.1%} of greedy answers end"]
    on = run.text("evaluation", "on")
    return plain(" on ".join(part for part in (", ".join(figures), on) if part))


def _by_position(run: Record) -> Iterator[tuple[str, float]]:
    """The KL where a document begins to be long, and at the end of the longest rows."""
    bands = {key: match for key in run.section("metrics") if (match := BAND.fullmatch(key))}
    ordered = sorted(bands.values(), key=lambda match: int(match[1]))
    for match in [*ordered[1:2], *ordered[2:][-1:]]:
        if (value := run.number("metrics", match[0])) is not None:
            yield f"{int(match[1]):,} to {int(match[2]) - 1:,}", value


def _export(run: Record) -> str:
    size, error = run.number("memory", "export_bytes"), run.number("metrics", "parity")
    parts = [run.text("config", "export", "name"), run.text("paths", "export")]
    parts += [] if size is None else [f"{size / 1e6:,.1f} MB"]
    parts += [] if error is None else [f"logits within {error:.1e}"]
    return plain(", ".join(parts))


def _cache(run: Record) -> str:
    return plain(run.text("paths", "cache"))
