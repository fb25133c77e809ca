"""What queries see, as spans: of documents, windows and chunks, and on their way through models of transformers."""

import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from qat import attention, masks
from qat.forward import FAST, run_body, use
from qat.rows import inputs

PLACES = torch.arange(12)
CAUSAL = PLACES[:, None] >= PLACES
DOCUMENTS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2, 3], list(range(12)), [5, 6, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0]])
KINDS = {
    "causal": CAUSAL,
    "window": CAUSAL & (PLACES[:, None] - PLACES < 4),
    "chunks": CAUSAL & (PLACES[:, None] // 5 == PLACES // 5),
}


def test_spans_of_documents_are_those_of_their_mask():
    mask, spans = masks.of_documents(DOCUMENTS), masks.spans_of_documents(DOCUMENTS)
    assert torch.equal(masks.of_spans(spans), mask)
    assert torch.equal(spans[:, 0, :, 0], mask[:, 0].int().argmax(-1).int())
    assert torch.equal(spans[:, 1, :, 0], (mask[:, 0] * (PLACES[:, None] + 1)).amax(1).int())
    assert torch.equal(masks.spans_of(mask), spans)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_chunks_are_spans_too(kind):
    mask = KINDS[kind].expand(2, 1, 12, 12)
    assert torch.equal(masks.of_spans(masks.spans_of(mask)), mask)


@pytest.mark.parametrize("place", [(7, 3), (3, 7), (5, 5)])
def test_of_a_row_that_is_not_one_of_spans_nothing_is_seen(place):
    """A gap, a token that sees one behind it, and one that does not see itself; the other row stays."""
    mask = CAUSAL.repeat(2, 1, 1, 1)
    mask[1, 0][place] = ~mask[1, 0][place]
    seen = masks.of_spans(masks.spans_of(mask))
    assert torch.equal(seen[0, 0], CAUSAL) and not seen[1].any()


def test_attention_without_kernels_takes_spans():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 12, 8) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    found, _ = attention.attend(module, q, k, v, masks.spans_of_documents(DOCUMENTS))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    wanted = scaled_dot_product_attention(q, k, v, masks.of_documents(DOCUMENTS)).transpose(1, 2)
    torch.testing.assert_close(found, wanted)


SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
MODELS = {
    "documents": (transformers.Qwen3Config, {}),
    "windows": (transformers.MistralConfig, {"sliding_window": 3}),
    "both": (transformers.Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("joined", [False, True])
def test_models_hand_spans_on_to_attention(kind, joined, monkeypatch):
    """As on a GPU whose rows are long, but for the kernel."""
    made, settings = MODELS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made(**SIZES, **settings), attn_implementation="eager").eval()
    ids = torch.randint(90, DOCUMENTS.shape)
    given = inputs(ids, DOCUMENTS == 0 if joined else None)
    with torch.no_grad():
        wanted = run_body(model, given)
        use(model, FAST)
        monkeypatch.setattr(attention, "_goes_by_spans", lambda *_: True)
        seen = []
        monkeypatch.setattr(masks, "of_spans", lambda spans, of=masks.of_spans: seen.append(spans.shape) or of(spans))
        found = run_body(model, given)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    layers = {"documents": 2 * joined, "windows": 2, "both": 1 + joined}[kind]
    assert seen == [(3, 2, 12, 1)] * layers


def test_outside_of_whole_rows_masks_are_those_of_transformers(monkeypatch):
    monkeypatch.setattr(attention, "_goes_by_spans", lambda *_: True)
    made = attention.mask(2, 5, 5, allow_is_causal_skip=False)
    assert made.dtype == torch.bool and torch.equal(made, CAUSAL[:5, :5].expand(2, 1, 5, 5))
