"""Pictures of a run, for people who would rather look than read.

matplotlib is imported where one is drawn: chats, exports and whatever else draws none do not wait for it.
"""

from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.artifacts import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING, HELD_OUT, KD = "#9aa5b1", "#1d4ed8", "#c2410c"
LEAVES = ("#1d4ed8", "#0891b2", "#0f766e", "#7c3aed", "#c2410c", "#ca8a04", "#be185d")


def loss_curve(rows: list[dict[str, float]], title: str, path: Path) -> None:
    """The loss of each step, and of each evaluation the same on held-out text and the KD loss, as a PNG.

    Args:
        rows: of `metrics.jsonl`: `loss` marks a training step, `kd_loss` an evaluation.
        title: what was trained.
        path: where the picture goes.
    """
    figure = _empty()
    axes = figure.subplots()
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    looks = [(row["step"], row["kd_loss"]) for row in rows if "kd_loss" in row]
    held_out = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
    if steps:
        axes.plot(*zip(*steps, strict=True), color=TRAINING, linewidth=1.2, label="training loss, each step")
    if held_out and held_out != looks:  # both are the same figures if the model trains on the KD loss
        axes.plot(*zip(*held_out, strict=True), color=HELD_OUT, marker=".", label="the same on held-out text")
    axes.plot(*zip(*looks, strict=True), color=KD, marker="o", label="KD loss on held-out text")
    for step, value in (looks[0], looks[-1]):
        axes.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(xlabel="step", ylabel="loss (nats)", title=title, ylim=(0, None))
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def error_by_depth(errors: dict[str, float], title: str, path: Path) -> None:
    """Relative output error of every quantized layer against its place in the model, as a PNG.

    Args:
        errors: by layer name, in the model's order; layers with one last name make one line.
        title: what was converted.
        path: where the picture goes.
    """
    figure = _empty()
    axes = figure.subplots()
    for leaf, color in zip(dict.fromkeys(name.rpartition(".")[2] for name in errors), cycle(LEAVES), strict=False):
        values = [error for name, error in errors.items() if name.endswith(f".{leaf}")]
        axes.plot(range(len(values)), values, marker=".", color=color, label=leaf)
    axes.set(xlabel="decoder layer", ylabel="relative output error", title=title, yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, ncols=4, fontsize="small")
    _save(figure, path)


def kl_by_position(curves: dict[str, list[tuple[float, float]]], title: str, path: Path) -> None:
    """KL against how many tokens of its document a model had read, as a PNG.

    Args:
        curves: tokens read and the mean KL there in nats, by what a person calls each student.
        title: what it was measured on.
        path: where the picture goes.
    """
    from matplotlib.ticker import LogLocator

    figure = _empty()
    axes = figure.subplots()
    for (name, curve), color in zip(curves.items(), cycle(LEAVES), strict=False):
        axes.plot(*zip(*curve, strict=True), marker=".", color=color, label=name)
    axes.set(xscale="log", xlabel="tokens of the document read", ylabel="full KL (nats)", ylim=(0, None))
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    _save(figure, path)


def tail_mass(tails: dict[str, list[float]], title: str, path: Path) -> None:
    """How much probability a cache's top-k leaves out, as a PNG: a histogram over its positions.

    Args:
        tails: probability outside the top-k at each position, by split.
        title: which cache.
        path: where the picture goes.
    """
    figure = _empty()
    axes = figure.subplots()
    edges = [10 ** (exponent / 8) for exponent in range(-40, 1)]
    for (split, values), color in zip(tails.items(), (TRAINING, KD), strict=False):
        shown = [max(value, edges[0]) for value in values]
        mean = sum(values) / len(values)
        weights = [1 / len(values)] * len(values)
        label = f"{split}: {len(values):,} positions, mean {mean:.4f}"
        axes.hist(shown, edges, weights=weights, histtype="step", linewidth=1.6, color=color, label=label)
        axes.axvline(mean, color=color, linestyle=":")
    axes.set(xscale="log", xlabel="probability outside the top-k (the leftmost bar: less)", ylabel="share of positions")
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def sweep(points: list[tuple[dict[str, str], float | None]], objective: str, title: str, path: Path) -> None:
    """The figure of every job of a sweep against what was swept, as a PNG.

    The key whose values are numbers, if there is one, is the horizontal axis; the other keys make a line each.

    Args:
        points: swept values, as typed, and the figure of each job; None where it has none.
        objective: what the figure is.
        title: of which sweep.
        path: where the picture goes.
    """
    shown = [(values, figure) for values, figure in points if figure is not None]
    keys = list(shown[0][0])
    axis = next((key for key in keys if all(_number(values[key]) is not None for values, _ in shown)), None)
    figure = _empty()
    axes = figure.subplots()
    lines: dict[str, list[tuple[Any, float]]] = {}
    for values, value in shown:
        others = ", ".join(f"{key}={values[key]}" for key in keys if key != axis)
        lines.setdefault(others if axis else "", []).append((_number(values[axis]) if axis else others or "one", value))
    for (name, line), color in zip(sorted(lines.items()), cycle(LEAVES), strict=False):
        line = sorted(line) if axis else line[::-1]
        if axis:
            axes.plot(*zip(*line, strict=True), marker="o", color=color, label=name)
        else:
            axes.barh([name for name, _ in line], [value for _, value in line], color=color, height=0.6)
    if axis:
        places = sorted({place for line in lines.values() for place, _ in line})
        axes.set(xlabel=axis, ylabel=objective)
        if places[0] > 0 and places[-1] > 10 * places[0]:
            axes.set_xscale("log")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize="small")
    else:
        axes.set(xlabel=objective)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y" if axis else "x", alpha=0.3)
    _save(figure, path)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _empty() -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 4.5), dpi=120, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    """Writes a picture, atomically."""
    content = BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())
