"""KL by position against each document alone, in float64 and by the model's own code."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat import checkpoints, plots
from qat.cache.batch import Batch, Text
from qat.distill.head import CHUNK_BYTES
from qat.evaluate import compare
from qat.evaluate.positions import Positions
from qat.evaluate.windows import Windows
from qat.forward import Pass, use
from tests import tiny

LENGTHS = ((3, 90, 207), (300,), (1, 1, 298), (150, 150))  # documents that share a row of 300 tokens


class Joined(Text):
    """Rows in which documents lie end to end."""

    def batch(self, rows):
        found = super().batch(rows)
        starts = torch.zeros_like(found.stored["input_ids"])
        for place, row in enumerate(rows.tolist()):
            starts[place, torch.tensor((0, *LENGTHS[row])).cumsum(0)[:-1]] = 1
        within = 1 - starts[:, 1:]  # the last token of a document predicts nothing
        return Batch(found.stored | {"document_starts": starts, "loss_mask": within}, 0, True)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(512, (len(LENGTHS), 300), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def student(teacher, cache, tmp_path_factory):
    folder = tiny.checkpoint_in(tmp_path_factory.mktemp("positions") / "student", teacher, cache)
    return checkpoints.load(folder, teacher, tiny.FP32)[0]


def alone(teacher, student, documents):
    """KL at each position of each document, by position, float64."""
    exact, parts, found = teacher.load(torch.float64, tiny.CPU), tiny.exact_weights(student), {}
    for document in documents:
        with torch.no_grad():
            theirs = exact(document[None]).logits[0, :-1].log_softmax(-1)
            ours = tiny.exact_logits(teacher, student, parts, document[None])[0, :-1].log_softmax(-1)
        for place, kl in enumerate((theirs.exp() * (theirs - ours)).sum(-1).tolist()):
            found.setdefault(place, []).append(kl)
    return found


def means(found):
    """By the first position of a band: the mean over it, and how many there were."""
    bands = {}
    for place, values in found.items():
        first = 0 if place < 64 else 1 << (place.bit_length() - 1)
        bands.setdefault(first, []).extend(values)
    return {first: (sum(values) / len(values), len(values)) for first, values in sorted(bands.items())}


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_bands_are_those_of_each_document_alone(teacher, student, ids, micro_batch):
    model = teacher.load(torch.float32, tiny.CPU)
    for one in (model, student):
        use(one, Pass("qat", product=True))
    found = compare(student, model, Joined(ids), 8, replace(tiny.FP32, micro_batch=micro_batch))
    documents = [part for row, lengths in zip(ids, LENGTHS, strict=True) for part in row.split(list(lengths))]
    expected = means(alone(teacher, student, documents))
    bands = found.positions.bands()
    assert [(band.first, band.end) for band in bands] == [(0, 64), (64, 128), (128, 256), (256, 512)]
    for band in bands:
        kl, count = expected[band.first]
        assert (band.kl, band.count) == (pytest.approx(kl, rel=1e-3), count)
        assert band.low <= band.kl <= band.high
    total = sum(band.kl * band.count for band in bands) / sum(band.count for band in bands)
    assert total == pytest.approx(found.metrics().kl, rel=1e-9)


def test_windows_count_positions_from_their_own_beginning(teacher, student, ids):
    model = teacher.load(torch.float32, tiny.CPU)
    windows = [ids[0, :200], ids[0, 200:]]
    found = compare(student, model, Windows(ids[0], 200, 200), 8, tiny.FP32)
    expected = means(alone(teacher, student, windows))
    assert {band.first: (band.kl, band.count) for band in found.positions.bands()} == {
        first: (pytest.approx(kl, rel=1e-3), count) for first, (kl, count) in expected.items()
    }


def test_a_large_vocabulary_is_taken_in_smaller_pieces(teacher, student, ids, monkeypatch):
    model = teacher.load(torch.float32, tiny.CPU)
    whole = compare(student, model, Text(ids), 8, tiny.FP32)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 7 * 4 * 512)
    sizes = []
    original = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: sizes.append(len(x)) or original(x, dim))
    pieces = compare(student, model, Text(ids), 8, tiny.FP32)
    assert max(sizes) == 7
    assert pieces.metrics().kl == pytest.approx(whole.metrics().kl, rel=1e-6)


@settings(max_examples=12)
@given(st.integers(2, 3000), st.data())
def test_every_position_is_in_one_bin_that_lies_in_one_band(length, data):
    places = data.draw(st.lists(st.integers(0, length - 2), min_size=1, max_size=20))
    positions = Positions(3, length)
    rows = torch.tensor([place % 3 for place in places])
    positions.add(rows, torch.tensor(places), torch.tensor([float(place) for place in places]))
    assert positions.counts_NB.sum() == len(places)
    bands = positions.bands()
    for band in bands:
        inside = [place for place in places if band.first <= place < band.end]
        assert (band.kl, band.count) == (pytest.approx(sum(inside) / len(inside)), len(inside))
    assert sum(band.count for band in bands) == len(places)
    assert all(one <= two for (one, _), (two, _) in zip(positions.curve(), positions.curve()[1:], strict=False))


def test_the_picture_is_a_png(tmp_path):
    plots.kl_by_position({"SR-001": [(1.0, 0.5), (2.0, 0.4), (1500.0, 0.3)]}, "on wiki.txt", tmp_path / "kl.png")
    assert (tmp_path / "kl.png").read_bytes()[:4] == b"\x89PNG"
