"""What `stage=evaluate` found of each model, as rows of a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qat.evaluate import Comparison, Metrics
from qat.evaluate.positions import Band
from qat.evaluate.tasks import STDERR, Scores

FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl": ("full KL", "{:.4f}".format),
    "kd_loss": ("KD loss", "{:.4f}".format),
    "perplexity": ("perplexity", "{:.2f}".format),
    "top1_agreement": ("same first choice", "{:.1%}".format),
}
ANSWERS = {
    "ended": ("end by themselves", 100, "{:.1f}%"),
    "tokens": ("tokens", 1, "{:.1f}"),
    "distinct": ("different 4-grams", 100, "{:.1f}%"),
    "agreeing": ("tokens as the teacher's", 1, "{:.1f}"),
}
SIZES = {
    "file_bytes": "MB, packed",
    "model_bits_per_weight": "bits per weight",
    "bits_per_weight": "bits per quantized weight",
}


@dataclass
class Found:
    """What was found of one model.

    Attributes:
        metrics: its figures.
        intervals: the ends of the interval of each.
        positions: its KL by position; none where the rows are too short for two bands.
        curve: the same as tokens read and KL, in finer steps.
        scores: of tasks.
        answers: what is told of its own answers, by how tokens were chosen.
        quant: what it is written in, and its sizes; None of the teacher.
    """

    metrics: Metrics | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    positions: list[Band] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)
    scores: Scores = field(default_factory=dict)
    answers: Scores = field(default_factory=dict)
    quant: dict[str, Any] | None = None

    def take(self, comparison: Comparison) -> "Found":
        """Adds what a comparison found."""
        self.metrics, self.intervals = comparison.metrics(), comparison.intervals()
        if comparison.positions and len(bands := comparison.positions.bands()) > 1:
            self.positions, self.curve = bands, comparison.positions.curve()
        return self

    def figures(self) -> dict[str, float]:
        """Its figures by the names that a run's record has for them."""
        measured = vars(self.metrics) if self.metrics else {}
        told = {f"{kind}_{name}": value for kind, one in self.answers.items() for name, value in one.items()}
        own = {name: value for name, value in told.items() if STDERR not in name}
        return measured | {band.key: band.kl for band in self.positions} | own


def figures(found: Mapping[str, Found]) -> list[list[str]]:
    """Table rows: figures with half their interval, scores of tasks, sizes."""
    models, rows = list(found.values()), []
    if any(one.metrics for one in models):
        rows += [[title, *(_figure(one, key) for one in models)] for key, (title, _) in FIGURES.items()]
    names = {(task, metric): None for one in models for task, scores in one.scores.items() for metric in scores}
    shown = [(task, metric) for task, metric in names if STDERR not in metric]
    rows += [[f"{task} {metric}", *(_score(one, task, metric) for one in models)] for task, metric in shown]
    return [*rows, *([title, *(_size(one, key) for one in models)] for key, title in SIZES.items())]


def positions(found: Mapping[str, Found]) -> list[list[str]]:
    """Table rows: the KL of each model in each band of positions, with half its interval."""
    bands = [{band.first: band for band in one.positions} for one in found.values()]
    firsts = dict.fromkeys(first for one in bands for first in one)
    ends = {band.first: band.end for one in bands for band in one.values()}
    return [[f"{first:,} to {ends[first] - 1:,}", *(_band(one.get(first)) for one in bands)] for first in firsts]


def answers(found: Mapping[str, Found]) -> list[list[str]]:
    """Table rows: what is told of answers, with 1.96 standard errors."""
    told = [one.answers for one in found.values()]
    kinds = dict.fromkeys(kind for one in told for kind in one)
    return [
        [f"{kind}: {title}", *(_told(one.get(kind, {}), name, times, form) for one in told)]
        for kind in kinds
        for name, (title, times, form) in ANSWERS.items()
        if any(name in one.get(kind, {}) for one in told)
    ]


def _told(figures: Mapping[str, float], name: str, times: int, form: str) -> str:
    if name not in figures:
        return "-"
    error = figures.get(f"{name}{STDERR}")
    return form.format(times * figures[name]) + (f" ± {form.format(times * 1.96 * error)}" if error else "")


def _figure(one: Found, key: str) -> str:
    if one.metrics is None:
        return "-"
    return _with_interval(getattr(one.metrics, key), one.intervals.get(key), FIGURES[key][1])


def _band(band: Band | None) -> str:
    return "-" if band is None else _with_interval(band.kl, (band.low, band.high), FIGURES["kl"][1])


def _with_interval(value: float, ends: tuple[float, float] | None, shown: Callable[[float], str]) -> str:
    if ends is None or ends[0] == ends[1]:
        return shown(value)
    return f"{shown(value)} ± {shown((ends[1] - ends[0]) / 2)}"


def _score(one: Found, task: str, metric: str) -> str:
    scores = one.scores.get(task, {})
    if metric not in scores:
        return "-"
    name, comma, kind = metric.partition(",")
    error = scores.get(f"{name}{STDERR}{comma}{kind}")
    return f"{scores[metric]:.4f}" + ("" if error is None else f" ± {1.96 * error:.4f}")


def _size(one: Found, key: str) -> str:
    if one.quant is None:
        return "-"
    return f"{one.quant[key] / 1e6:.1f}" if key == "file_bytes" else f"{one.quant[key]:.2f}"
