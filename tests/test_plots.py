"""The picture of a run."""

import struct

import pytest
from matplotlib.figure import Figure

from qat import plots
from qat.plots import loss_curve

pytestmark = pytest.mark.usefixtures("drawn")

ROWS = [{"step": 0, "kd_loss": 5.8}] + [{"step": step, "loss": 5.0 / step} for step in range(1, 6)]


def size_of(path):
    """Width and height, read off the header as the PNG standard has it."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and header[12:16] == b"IHDR"
    return struct.unpack(">II", header[16:24])


@pytest.fixture
def axes(monkeypatch):
    """The axes that the next picture was drawn on."""
    seen = []

    class Kept(Figure):
        def subplots(self, *args, **kwargs):
            seen.append(super().subplots(*args, **kwargs))
            return seen[-1]

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    return seen


@pytest.mark.parametrize(
    "rows",
    [
        [*ROWS, {"step": 5, "kd_loss": 1.1}],
        ROWS,  # stopped before the second look
        [{"step": 0, "kd_loss": 5.8}],  # no step yet
        [{"step": 0, "kd_loss": 0.0}, {"step": 1, "loss": 0.0}, {"step": 1, "kd_loss": 0.0}],
    ],
    ids=["whole", "one evaluation", "no training", "all zero"],
)
def test_picture_is_a_png_of_readable_size(tmp_path, rows):
    loss_curve(rows, "tiny: v2_q2a4_mlp_0.58_fp32", tmp_path / "loss.png")
    width, height = size_of(tmp_path / "loss.png")
    assert 800 <= width <= 2000 and 400 <= height <= 1200


def test_both_curves_hold_the_figures_of_the_rows(tmp_path, axes):
    loss_curve([*ROWS, {"step": 5, "kd_loss": 1.1}], "named", tmp_path / "loss.png")
    training, held_out = axes[0].get_lines()
    assert list(training.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(training.get_ydata()) == [5.0 / step for step in range(1, 6)]
    assert list(zip(held_out.get_xdata(), held_out.get_ydata(), strict=True)) == [(0, 5.8), (5, 1.1)]
    assert [note.get_text() for note in axes[0].texts] == ["5.800", "1.100"]
    assert (axes[0].get_title(), axes[0].get_ylim()[0]) == ("named", 0)


def test_what_is_trained_is_drawn_on_held_out_text_where_it_is_not_the_kd_loss(tmp_path, axes):
    looks = [{"step": 0, "held_out_loss": 3.0, "kd_loss": 5.8}, {"step": 5, "held_out_loss": 0.5, "kd_loss": 1.1}]
    loss_curve([*ROWS[1:], *looks], "named", tmp_path / "loss.png")
    _, held_out, kd = axes[0].get_lines()
    assert (list(held_out.get_ydata()), list(kd.get_ydata())) == ([3.0, 0.5], [5.8, 1.1])
    loss_curve([{**look, "held_out_loss": look["kd_loss"]} for look in looks], "named", tmp_path / "loss.png")
    assert len(axes[1].get_lines()) == 1


def test_error_by_depth_is_drawn_for_any_number_of_leaves(tmp_path):
    errors = {f"model.layers.{i}.block.leaf{j}_proj": 0.01 * (i + j + 1) for i in range(3) for j in range(9)}
    plots.error_by_depth(errors, "tiny", tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("points", "lines", "bars"),
    [
        ([({"lr": "1e-3", "quant": "a"}, 0.3), ({"lr": "1", "quant": "a"}, 0.2), ({"lr": "2", "quant": "b"}, 1)], 2, 0),
        ([({"lr": "1"}, 0.3), ({"lr": "2"}, None)], 1, 0),
        ([({"quant": "q2a4"}, 0.3), ({"quant": "q4a4"}, 0.1)], 0, 2),
    ],
    ids=["two keys", "a job that failed", "words alone"],
)
def test_a_sweep_is_a_line_over_numbers_and_bars_over_words(tmp_path, axes, points, lines, bars):
    plots.sweep(points, "kl", "sweep-001", tmp_path / "sweep.png")
    size_of(tmp_path / "sweep.png")
    assert (len(axes[0].lines), len(axes[0].patches)) == (lines, bars)


def test_the_tail_of_each_split_is_drawn_whatever_its_range(tmp_path, axes):
    plots.tail_mass({"train": [0.0, 1e-9, 0.5, 1.0], "eval": [0.1]}, "L64", tmp_path / "tail.png")
    size_of(tmp_path / "tail.png")
    assert axes[0].get_legend().get_texts()[0].get_text() == "train: 4 positions, mean 0.3750"
