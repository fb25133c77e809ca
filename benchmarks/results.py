"""Rows of a comparison: kept as JSON, printed as a table, drawn as KL against megabytes."""

import json
from pathlib import Path
from typing import Any

from qat.artifacts import write_json
from qat.errors import ArtifactError

OURS = "ours"
COLORS = {
    "RTN": "#9aa5b1",
    "HQQ": "#ca8a04",
    "GPTQ": "#0f766e",
    "AutoRound": "#7c3aed",
    "uniform grid, trained": "#111827",
}
OUR_COLORS = ("#c2410c", "#1d4ed8", "#be185d")


class Results:
    """Rows in a JSON file, written after each; one a method, name and text. Several commands may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows that are there now.

        Raises:
            ArtifactError: the file is not what this script writes.
        """
        try:
            rows = json.loads(self.path.read_text()) if self.path.exists() else []
            for row in rows:
                _place(row)
            return rows
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{self.path} does not hold rows of this script ({error!r}): mend or delete it"
            ) from None

    def has(self, row: dict[str, Any]) -> bool:
        """True where this row is there, made with the same settings."""
        return any(_place(old) == _place(row) and old["settings"] == row["settings"] for old in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Puts a row in, in place of an older one of the same method, name and text."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, [old for old in self.rows if _place(old) != _place(row)] + [row])

    def merge(self, others: "Results") -> None:
        """Adds all rows of another file.

        Raises:
            ArtifactError: there is no such file, or it is not what this script writes.
        """
        if not others.path.exists():
            raise ArtifactError(f"{others.path}: no such file")
        for row in others.rows:
            self.add(row)


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["name"], row["text"]


def table(rows: list[dict[str, Any]], skipped: dict[str, str]) -> str:
    """Markdown: a line a model in order of size, a column a text, then what could not run and why."""
    names = sorted({row["text"] for row in rows})
    heads = ["method", "", "MB", "bits on the MLP", *(f"{name} KL" for name in names), "values a group", "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    models: dict[tuple[float, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        models.setdefault((row["megabytes"], row["method"], row["name"]), {})[row["text"]] = row
    for (size, method, name), by_text in sorted(models.items()):
        told = next(iter(by_text.values()))
        kl = " | ".join(shown(by_text[text]) if text in by_text else "" for text in names)
        levels = ", ".join(f"{count} ({kind})" for kind, count in told.get("levels", {}).items())
        figures = f"{size:.1f} | {told['bits']:.2f} | {kl}"
        lines.append(f"| {method} | {name} | {figures} | {levels} | {told.get('seconds', '')} |")
    return "\n".join([*lines, *(f"\n{label} was left out: {reason}" for label, reason in skipped.items())])


def shown(row: dict[str, Any], figure: str = "kl") -> str:
    """A figure; of several seeds their mean and standard deviation."""
    spread = f" ± {row['deviation'][figure]:.3f}" if "deviation" in row else ""
    return f"{row[figure]:.3f}{spread}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL against megabytes, a panel a text: our presets as lines, peers as points."""
    from matplotlib.figure import Figure  # machines that only compute may lack it
    from matplotlib.ticker import LogLocator

    names = sorted({row["text"] for row in rows})
    figure = Figure(figsize=(5.5 * len(names), 5), dpi=120, layout="constrained")
    methods = sorted({line_of(row) for row in rows}, key=lambda method: (method.startswith(OURS), method))
    ours = [method for method in methods if method.startswith(OURS)]
    colors = COLORS | dict(zip(ours, OUR_COLORS, strict=False))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, names, strict=True):
        for method in methods:
            members = [row for row in rows if (line_of(row), row["text"]) == (method, text)]
            points = sorted((row["megabytes"], row["kl"], row["name"]) for row in members)
            if points:
                show(axes, points, method, colors[method], above="trained" not in method or "budgets" in method)
        axes.set(xlabel="MB of the file", title=text, yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL(teacher‖student), nats")
    panels[-1].legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def line_of(row: dict[str, Any]) -> str:
    """What a model is drawn as: formats that a budget chose are one line, presets another."""
    return f"{row['method']}, budgets" if row["name"].startswith("budget_") else str(row["method"])


def show(axes: Any, points: list[tuple[float, float, str]], method: str, color: str, above: bool) -> None:
    """One method: a line with names above or below it if it is ours, else points."""
    from matplotlib.patheffects import withStroke

    sizes, kl, names = zip(*points, strict=True)
    if not method.startswith(OURS):
        axes.plot(sizes, kl, linestyle="", marker="s", markersize=6, color=color, label=method)
        return
    axes.plot(sizes, kl, marker="o", color=color, label=method)
    for x, y, name in zip(sizes, kl, names, strict=True):
        place: dict[str, Any] = {"xytext": (5, 5)} if above else {"xytext": (-6, -10), "ha": "right"}
        label = axes.annotate(name, (x, y), textcoords="offset points", fontsize=7, color=color, zorder=5, **place)
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable on other points
