"""A pass is taken where it says what the model's own forward pass says of each document alone, and nowhere else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface

from qat import attention, forward, head, masks
from qat.cache.reader import CacheReader
from qat.errors import ArtifactError, ConfigError, NumericsError
from qat.fidelity import Sample, ready, settle
from qat.fidelity.exact import in_fp32
from qat.forward import FAST, FUSED, OWN, Found, Pass, body, hidden_states, use, used
from qat.head import OutputHead
from qat.machine import Machine
from qat.models import ModelFolder

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
MIXING = {"num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]}
CPU = torch.device("cpu")
LENGTH = 40
STARTS = torch.zeros(3, LENGTH, dtype=torch.uint8)
STARTS[:, 0] = STARTS[0, [7, 8, 20]] = STARTS[1, 30] = 1
IDS = torch.randint(300, (3, LENGTH), generator=torch.Generator().manual_seed(1))
JOINED = Sample.of(IDS, 1 - STARTS[:, 1:], STARTS)
MASK = torch.ones(3, LENGTH - 1)
MASK[1, 12:] = 0
APART = Sample.of(IDS, MASK, None)


def made(kind, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(dtype)


def found(model, sample=JOINED, repack=True):
    return settle(ModelFolder("it", Path(), ""), Machine(CPU, model.dtype, 2), sample, model, repack)


def own(model, sample=JOINED):
    """Log-probabilities of each document alone, one after the other, at the places looked at."""
    use(model, OWN)
    pairs = zip(sample.alone(), sample.places, strict=True)
    with torch.no_grad():
        return torch.cat([model(ids).logits[0, places].log_softmax(-1) for ids, places in pairs])


@pytest.mark.parametrize(
    ("kind", "settings", "wanted"),
    [
        ("Llama", {}, FAST),
        ("Mistral", {"sliding_window": 8}, FAST),
        ("Granite", {"logits_scaling": 4.0}, Pass(attention.NAME, product=False)),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}, OWN),
        ("Qwen3Next", MIXING,
         Pass(attention.NAME, product=True, joined=False)),
    ],
)  # fmt: skip
def test_the_fastest_pass_that_is_right_is_taken_and_says_what_the_model_says(kind, settings, wanted):
    model = made(kind, **settings)
    alone = own(model)
    how = found(model)
    assert how == wanted == used(model)
    inputs, places = JOINED.together(how.joined, model.device)
    with torch.no_grad():
        given = OutputHead(model).logits(hidden_states(model, inputs)[places]).log_softmax(-1)
    torch.testing.assert_close(given, alone, rtol=1e-4, atol=1e-4)


def blind(position_ids):
    """Documents that share a row see each other."""
    return torch.zeros_like(position_ids)


def uncut(*_, **__):
    """No window is ever needed."""
    return True


def shaken(module, q, k, v, mask, **others):
    """Attention that is a little off."""
    out, weights = attention.attend(module, q, k, v, mask, **others)
    return out * 1.01, weights


@pytest.fixture
def planted(monkeypatch):
    """Puts a fault where the fast pass alone goes by."""

    def plant(fault):
        if fault in (shaken, wrong_in_16_bits):
            AttentionInterface.register(attention.NAME, fault)
        else:
            monkeypatch.setattr(masks, "documents" if fault is blind else "_needs_none", fault)

    yield plant
    AttentionInterface.register(attention.NAME, attention.attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fault", "sample"), [(blind, JOINED), (uncut, APART), (shaken, JOINED), (shaken, APART)])
def test_a_fault_in_masks_or_attention_is_found_and_the_models_own_taken(planted, fault, sample, dtype):
    planted(fault)
    assert found(made("Mistral", dtype, sliding_window=8), sample).attention == "eager"


def wrong_in_16_bits(module, q, *others, **named):
    """As a kernel that only 16-bit numbers take may be."""
    return attention.attend(module, 3 * q if q.dtype == torch.bfloat16 else q, *others, **named)


def test_a_fault_of_16_bits_alone_is_found(planted):
    planted(wrong_in_16_bits)
    assert found(made("Llama", torch.bfloat16)) == OWN
    assert found(made("Llama", torch.float32)) == FAST


def test_a_head_that_is_wrong_everywhere_is_refused_by_the_models_name(monkeypatch):
    monkeypatch.setattr(head.OutputHead, "_own", lambda self, hidden: 2 * self.model.lm_head(hidden))
    with pytest.raises(ConfigError, match=r"^it \(LlamaForCausalLM\) says something else of rows of 40") as error:
        found(made("Llama"))
    assert "\n" not in str(error.value)


def test_a_product_that_is_not_all_of_the_head_is_not_taken_for_it(monkeypatch):
    model = made("Llama")
    assert found(model).product
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * 1.01)
    assert not found(model).product


def test_documents_that_may_not_be_moved_apart_are_refused():
    model = made("Qwen3Next", **MIXING)
    with pytest.raises(ConfigError, match="depends on more than the tokens before"):
        found(model, repack=False)


def test_a_model_that_sees_what_comes_is_refused():
    config = transformers.BertConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match="BertLMHeadModel"):
        found(model, APART)


def test_nan_never_passes():
    model = made("Llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="NaN or infinity"):
        found(model)


def test_a_cache_that_says_something_else_is_refused(cache, teacher):
    rows = Sample.of_rows(CacheReader(cache, "train"))
    fp32 = Machine(CPU, torch.float32, 2)
    assert settle(replace(teacher, found=Found()), fp32, rows) == FAST
    other = teacher.load(torch.float32, CPU)
    other.model.layers[0].mlp.up_proj.weight.data *= 1.5
    with pytest.raises(ArtifactError, match=r"the cache does not hold what tiny \(LlamaForCausalLM\) says, by 0\.\d+"):
        settle(replace(teacher, found=Found()), fp32, rows, other)


def test_of_rows_that_predict_nothing_the_models_own_pass_is_taken():
    starts = torch.ones(2, 4, dtype=torch.uint8)
    assert found(made("Llama"), Sample.of(torch.zeros(2, 4), 1 - starts[:, 1:], starts)) == OWN


def test_it_is_looked_for_once_for_rows_of_a_kind(monkeypatch):
    teacher, model, looked = ModelFolder("it", Path(), ""), made("Llama"), []
    entered = forward.hidden_states
    monkeypatch.setattr("qat.models.streamed.hidden_states", lambda *_: (looked.append(1), entered(*_))[1])
    for sample in (JOINED, JOINED, APART, JOINED):
        settle(teacher, Machine(CPU, torch.float32, 2), sample, model)
    assert len(looked) == 2
    assert used(model).joined and teacher.found.passes[torch.float32, "cpu"] == used(model)


class Off:
    """Fused layers that give other numbers."""

    def __init__(self, model, checkpointing):
        self.model = model

    def __call__(self, **inputs):
        return self.factor * forward.run_body(self.model, inputs).flatten(0, 1)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_fused_layers_stay_only_where_they_are_right(monkeypatch, factor):
    monkeypatch.setattr(Off, "factor", factor, raising=False)
    monkeypatch.setattr(forward, "decoder", Off)
    monkeypatch.setattr(forward.torch, "compile", lambda layer, dynamic: layer)
    model = made("Llama", torch.bfloat16)
    found(model)
    ready(model, JOINED, compiled=True)
    assert (vars(body(model))[FUSED] is not None) == used(model).fused == (factor == 1.0)


def test_in_fp32_weights_are_wide_and_come_back_as_they_were():
    model = made("Llama", torch.float16)
    before = {name: (value, value.data_ptr()) for name, value in model.state_dict().items()}
    with in_fp32(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"][0].float())
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][1] and torch.equal(value, before[name][0])
