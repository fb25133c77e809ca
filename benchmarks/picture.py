"""Rows of a comparison as a picture: KL against megabytes, a panel a text, our presets as lines, peers as points.

What was trained has a bar of one standard deviation each way over its seeds, and a hollow point with fewer seeds than a
record has. Labels are put one after the other where they hide least, points and lines included.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from results import OURS, SEEDS_OF_A_RECORD

COLORS = {
    "RTN": "#9aa5b1",
    "HQQ": "#ca8a04",
    "GPTQ": "#0f766e",
    "AutoRound": "#7c3aed",
    "llama.cpp": "#15803d",
    "MLX": "#0284c7",
    "uniform grid, trained": "#111827",
}
OUR_COLORS = ("#c2410c", "#1d4ed8", "#be185d", "#7f1d1d")
MARKERS = {"llama.cpp": "D", "MLX": "^"}  # of engines; methods on a grid have squares
DISTANCES, DIRECTIONS = (7, 14, 22, 32, 44), 16  # in points, of a label from its point
STEPS = 40  # boxes along a piece of a line
DPI = 120
POINT = DPI / 72  # pixels

Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Writes the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    composed(rows).savefig(path)


def composed(rows: list[Row]) -> Any:
    """The figure of matplotlib."""
    from matplotlib.figure import Figure  # machines that only compute may lack it

    names = sorted({row["text"] for row in rows})
    figure = Figure(figsize=(7 * len(names), 7), dpi=DPI, layout="constrained")
    methods = sorted({line_of(row) for row in rows}, key=lambda method: (method.startswith(OURS), method))
    ours = [method for method in methods if method.startswith(OURS)]
    colors = COLORS | dict(zip(ours, OUR_COLORS, strict=False))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, names, strict=True):
        for method in methods:
            show(axes, [row for row in rows if (line_of(row), row["text"]) == (method, text)], method, colors[method])
        dress(axes, text)
    panels[0].set_ylabel("KL(teacher‖student), nats")
    if any(few(row) for row in rows):
        hollow = {"marker": "o", "color": "black", "markerfacecolor": "white", "markersize": 5}
        panels[0].plot([], [], linestyle="", label=f"trained with fewer than {SEEDS_OF_A_RECORD} seeds", **hollow)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.draw_without_rendering()  # so that places in the picture are known
    for axes, text in zip(panels, names, strict=True):
        place(axes, [row for row in rows if row["text"] == text], colors)
    return figure


def line_of(row: Row) -> str:
    """What a model is drawn as: formats that a budget chose are one line, presets another."""
    return f"{row['method']}, budgets" if row["name"].startswith("budget_") else str(row["method"])


def label_of(row: Row) -> str:
    """A model's name where its method is told by its colour: `2 bits`, `IQ4_XS, embedding IQ4_NL`, `budget 77mb`."""
    first, colon, second = row["name"].partition(":")
    if not colon:
        return first.replace("_", " ") if line_of(row).endswith("budgets") else first
    return f"{first} bits" if first.isdecimal() else f"{first}, embedding {second}"


def show(axes: Any, rows: list[Row], method: str, color: str) -> None:
    """One method: a line if it is ours, else points."""
    rows = sorted(rows, key=lambda row: row["megabytes"])
    look: dict[str, Any] = {"color": color, "markersize": 5}
    if not method.startswith(OURS):
        axes.plot(*points(rows), linestyle="", marker=MARKERS.get(method, "s"), label=method, **look)
        return
    axes.plot(*points(rows), marker="o", label=method, **look)
    look |= {"marker": "o", "capsize": 3, "zorder": 3}
    for row in rows:
        spread, face = row.get("deviation", {}).get("kl", 0.0), "white" if few(row) else color
        axes.errorbar(row["megabytes"], row["kl"], spread, markerfacecolor=face, **look)


def few(row: Row) -> bool:
    """Whether a student of ours was trained with too few seeds for a record."""
    return row["method"].startswith(f"{OURS}, trained") and row.get("seeds", 1) < SEEDS_OF_A_RECORD


def points(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Megabytes and KL."""
    return [row["megabytes"] for row in rows], [row["kl"] for row in rows]


def dress(axes: Any, text: str) -> None:
    """Axes and grid."""
    from matplotlib.ticker import LogLocator

    axes.set(xlabel="MB of the file", title=text, yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.margins(x=0.08, y=0.06)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def place(axes: Any, rows: list[Row], colors: dict[str, str]) -> None:
    """Puts a label to each model, those with the least room around them first."""
    from matplotlib.patheffects import withStroke

    spots = [axes.transData.transform((row["megabytes"], row["kl"])) for row in rows]
    busy = [_box(*spot, 9, 9) for spot in spots] + _along_lines(axes)
    order = sorted(range(len(rows)), key=lambda i: sorted(math.dist(spots[i], spot) for spot in spots)[2:4])
    for i in order:
        color = colors[line_of(rows[i])]
        label = axes.annotate(
            label_of(rows[i]),
            (rows[i]["megabytes"], rows[i]["kl"]),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            color=color,
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable on grid and lines
        extent = label.get_window_extent()
        box = _best(spots[i], extent.width, extent.height, busy, axes.bbox)
        label.set_position([(middle - at) / POINT for middle, at in zip(_middle(box), spots[i], strict=True)])
        label.arrow_patch.set_visible(math.dist(_nearest(box, spots[i]), spots[i]) > DISTANCES[0] * POINT * 1.5)
        busy.append(box)


def _best(spot: Any, width: float, height: float, busy: list[Any], inside: Any) -> Any:
    """The box near a point that covers the least; of those that cover nothing the nearest."""
    places = []
    for distance in DISTANCES:
        for turn in range(DIRECTIONS):
            angle = 2 * math.pi * turn / DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            away = distance * POINT
            box = _box(spot[0] + across * (away + width / 2), spot[1] + up * (away + height / 2), width, height)
            outside = width * height - _shared(box, inside)
            hidden = sum(_shared(box, other) for other in busy) + 10 * outside
            places.append((round(hidden), len(places), box))
    return min(places, key=lambda place: place[:2])[2]


def _along_lines(axes: Any) -> list[Any]:
    """Small boxes along the lines of a panel."""
    found = []
    for line in axes.lines:
        if line.get_linestyle() == "None":
            continue
        for (x, y), (to_x, to_y) in pairwise(axes.transData.transform(line.get_xydata())):
            found += [_box(x + (to_x - x) * s / STEPS, y + (to_y - y) * s / STEPS, 3, 3) for s in range(STEPS)]
    return found


def _box(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _middle(box: Any) -> tuple[float, float]:
    return (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2


def _nearest(box: Any, spot: Any) -> tuple[float, float]:
    """The place in a box that is nearest to a point."""
    return min(max(spot[0], box.x0), box.x1), min(max(spot[1], box.y0), box.y1)


def _shared(one: Any, other: Any) -> float:
    """The area that two boxes share."""
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    up = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(across, 0.0) * max(up, 0.0)
