"""The rows a model is looked at on: those that show most, and the documents in them."""

import torch

from qat.cache.reader import CacheReader
from qat.evaluate.windows import Windows
from qat.fidelity.sample import POSITIONS, Sample


def test_of_joined_rows_one_with_one_document_and_one_with_much_behind_a_boundary_are_taken():
    starts = torch.zeros(4, 6, dtype=torch.uint8)
    starts[:, 0] = starts[0, [1, 2, 3]] = starts[2, [2, 3]] = starts[3, 5] = 1
    ids = torch.arange(24).view(4, 6)
    sample = Sample.of(ids, 1 - starts[:, 1:], starts)
    assert sample.input_ids.tolist() == [ids[1].tolist(), ids[2].tolist()]
    assert sample.documents == [(0, 0, 6), (1, 0, 2), (1, 3, 6)]  # one token predicts nothing
    assert [ids.tolist() for ids in sample.alone()] == [[[6, 7, 8, 9, 10, 11]], [[12, 13]], [[15, 16, 17]]]


def test_together_and_apart_places_are_those_of_the_same_tokens():
    starts = torch.zeros(1, 6, dtype=torch.uint8)
    starts[0, [0, 2, 3]] = 1
    sample = Sample.of(torch.arange(6)[None] + 10, 1 - starts[:, 1:], starts, pad=7)
    joined, places = sample.together(True, torch.device("cpu"))
    assert joined["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert joined["input_ids"][:, :-1].flatten()[places].tolist() == [10, 13, 14]
    apart, places = sample.together(False, torch.device("cpu"))
    assert apart["input_ids"].tolist() == [[10, 11, 7, 7, 7, 7], [13, 14, 15, 7, 7, 7]] and len(apart) == 1
    assert apart["input_ids"][:, :-1].flatten()[places].tolist() == [10, 13, 14]


def test_of_padded_rows_the_fullest_and_the_emptiest_are_taken_without_their_padding():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    sample = Sample.of(torch.arange(18).view(3, 6), mask, None)
    assert sample.documents == [(0, 0, 6), (1, 0, 2)] and sample.input_ids[:, 0].tolist() == [6, 12]


def test_of_windows_all_tokens_are_seen_whichever_of_them_count():
    windows = Windows(torch.arange(25), context=10, stride=5)
    sample = Sample.of_rows(windows)
    assert sample.shape == (10, False) and {ids.shape[1] for ids in sample.alone()} == {10}


def test_of_long_rows_places_are_spread_and_the_last_is_among_them():
    sample = Sample.of(torch.zeros(1, 2000), torch.ones(1, 1999), None)
    (places,) = sample.places
    assert len(places) == POSITIONS and places[0] == 0 and places[-1] == 1998


def test_rows_of_a_cache_come_with_what_it_says_of_them(cache):
    reader = CacheReader(cache, "train")
    sample = Sample.of_rows(reader)
    assert sample.shape == (reader.meta["length"], True)
    whole = reader.batch(torch.arange(reader.rows))
    numbers = [int((whole.input_ids == ids).all(1).nonzero()[0]) for ids in sample.input_ids]
    ids, logprobs = sample.told()
    wanted = [(whole.topk_ids[n], whole.topk_logprobs[n]) for n in numbers]
    parts = [
        (wanted[row][0][first + places], wanted[row][1][first + places])
        for (row, first, _), places in zip(sample.documents, sample.places, strict=True)
    ]
    assert torch.equal(ids, torch.cat([part[0] for part in parts]))
    assert torch.equal(logprobs, torch.cat([part[1] for part in parts]))


def test_rows_that_predict_nothing_have_no_documents():
    starts = torch.ones(2, 4, dtype=torch.uint8)
    sample = Sample.of(torch.zeros(2, 4), 1 - starts[:, 1:], starts)
    assert sample.documents == [] and sample.places == []
