"""The picture of a comparison: every label can be read, and what chance could have made looks so."""

import itertools

import picture
import pytest
from matplotlib.text import Text


def row(method: str, name: str, megabytes: float, kl: float, **more):
    return {"method": method, "name": name, "text": "chat", "megabytes": megabytes, "kl": kl, **more}


SPREAD = {"kl": 0.01}
CROWDED = [
    *(row("llama.cpp", f"IQ{i}_XS:IQ4_NL", 90 + i / 2, 0.1 * 1.1**i) for i in range(5)),
    *(row("GPTQ", f"{i}:64", 91 + i / 2, 0.11 * 1.1**i) for i in range(5)),
    *(row("ours, trained", f"q{i}a4", 80 + 5 * i, 0.3 / (i + 1), seeds=i + 1, deviation=SPREAD) for i in range(4)),
    row("ours, trained", "budget_56mb", 56, 0.2),
    row("MLX", "2:64", 42, 14.0),
]


@pytest.fixture(scope="module")
def figure():
    figure = picture.composed(CROWDED)
    figure.draw_without_rendering()
    return figure


def test_no_label_lies_on_another_or_outside(figure):
    (axes,) = figure.axes
    assert len(axes.texts) == len(CROWDED)
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}  # without the line to the point
    for one, other in itertools.combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)
    for name, box in boxes.items():
        assert all(axes.bbox.x0 <= x <= axes.bbox.x1 for x in (box.x0, box.x1)), name
        assert all(axes.bbox.y0 <= y <= axes.bbox.y1 for y in (box.y0, box.y1)), name


def test_labels_say_what_colours_do_not(figure):
    labels = {text.get_text() for text in figure.axes[0].texts}
    assert {"2 bits", "IQ0_XS, embedding IQ4_NL", "q2a4", "budget 56mb"} <= labels


def test_fewer_than_three_seeds_are_hollow(figure):
    faces = {}
    for line in figure.axes[0].lines:
        if line.get_marker() == "o" and len(line.get_xdata()) == 1:
            faces[float(line.get_xdata()[0])] = line.get_markerfacecolor()
    assert {x for x, face in faces.items() if face == "white"} == {56, 80, 85}
    assert {90, 95} <= faces.keys()
    assert "trained with fewer than 3 seeds" in [text.get_text() for text in figure.legends[0].get_texts()]
