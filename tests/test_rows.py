"""Documents that share a row do not see each other: every one as if it were alone."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from qat.masks import of_documents
from qat.rows import inputs

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module", params=[transformers.LlamaConfig, transformers.Qwen3Config])
def model(request):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(request.param(**SHAPE), attn_implementation="sdpa").eval()


def test_logits_are_those_of_each_document_alone(model):
    lengths = [[1, 4, 7], [12], [5, 6, 1]]
    ids = torch.randint(90, (3, 12), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros(3, 12, dtype=torch.uint8)
    for row, parts in enumerate(lengths):
        starts[row, torch.tensor([0, *parts[:-1]]).cumsum(0)] = 1
    with torch.no_grad():
        together = model(**inputs(ids, starts), use_cache=False).logits
        for row, parts in enumerate(lengths):
            alone = [model(document[None], use_cache=False).logits[0] for document in ids[row].split(parts)]
            torch.testing.assert_close(together[row], torch.cat(alone), rtol=1e-4, atol=1e-4)
            if len(parts) > 1:
                blind = model(ids[row : row + 1]).logits[0]
                assert (blind - torch.cat(alone)).abs().max() > 0.1  # else this would show nothing


def test_a_document_of_its_own_needs_no_mask(model):
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert set(inputs(ids, None)) == {"input_ids"}


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_mask_and_positions_are_those_of_a_loop(rows):
    starts = torch.tensor(rows)
    starts[:, 0] = True
    found = inputs(torch.zeros_like(starts, dtype=torch.long), starts)
    for row, begins in enumerate(starts.tolist()):
        first = 0
        mask = of_documents(found["position_ids"])
        for place, begin in enumerate(begins):
            first = place if begin else first
            assert found["position_ids"][row, place] == place - first
            seen = mask[row, 0, place].nonzero().flatten().tolist()
            assert seen == list(range(first, place + 1))
