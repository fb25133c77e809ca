import copy
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from torch import nn
from transformers import PreTrainedModel

from qat.config import QuantConfig, WeightConfig
from qat.config.keys import key
from qat.errors import ConfigError
from qat.quant.architectures import recorded, select
from qat.quant.formats import Codebook
from qat.quant.places import bias, matrix
from qat.quant.size import bits_per_weight, summary


@cache
def skeleton(kind: str = "Llama", **shape: Any) -> PreTrainedModel:
    """A model of transformers by its names and shapes, without memory behind it."""
    config = getattr(transformers, f"{kind}Config")(**SMALL | shape)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


SMALL = {
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4}


def smollm2(**shape: Any) -> PreTrainedModel:
    return skeleton(
        **shape,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def qwen3() -> PreTrainedModel:
    return skeleton(
        "Qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )


def preset(name: str) -> QuantConfig:
    """A preset as the command line gives it."""
    conf = Path(__file__).resolve().parents[2] / "conf" / "quant"
    with initialize_config_dir(str(conf), version_base="1.3"):
        values = compose(name)
    kinds = {kind: WeightConfig(**values[kind]) if values[kind] else None for kind in ("mlp", "attn")}
    return QuantConfig(name=values.name, **kinds)


def by_hand(bits: int, rank: int, *shapes: tuple[int, int]) -> float:
    """16-bit scales and a 16-bit codebook on top of the indices, over all weights of some layers."""
    weights = sum(o * i for o, i in shapes)
    return bits + sum(16 * rank * (o + i) + 16 * 2**bits for o, i in shapes) / weights


SMOLLM2_MLP = ((1536, 576), (1536, 576), (576, 1536))
SMOLLM2_ATTENTION = ((576, 576), (192, 576), (192, 576), (576, 576))
QWEN3_MLP = ((3072, 1024), (3072, 1024), (1024, 3072))
QWEN3_ATTENTION = ((2048, 1024), (1024, 1024), (1024, 1024), (1024, 2048))


@pytest.mark.parametrize(
    ("name", "mlp", "attention"),
    [("q2a4", (2, 32), (4, 8)), ("q4a4", (4, 4), (4, 4)), ("q4a4_r32", (4, 32), (4, 32)), ("q2a2", (2, 32), (2, 32))],
)
@pytest.mark.parametrize(
    ("model", "mlp_shapes", "attention_shapes"),
    [(smollm2, SMOLLM2_MLP, SMOLLM2_ATTENTION), (qwen3, QWEN3_MLP, QWEN3_ATTENTION)],
)
def test_bits_per_weight_are_those_computed_by_hand(name, mlp, attention, model, mlp_shapes, attention_shapes):
    figures = summary(select(model(), preset(name)), model())
    assert figures["mlp_bits_per_weight"] == pytest.approx(by_hand(*mlp, *mlp_shapes), abs=1e-4)
    assert figures["attn_bits_per_weight"] == pytest.approx(by_hand(*attention, *attention_shapes), abs=1e-4)
    weights = [sum(o * i for o, i in shapes) for shapes in (mlp_shapes, attention_shapes)]
    mean = (figures["mlp_bits_per_weight"] * weights[0] + figures["attn_bits_per_weight"] * weights[1]) / sum(weights)
    assert figures["bits_per_weight"] == pytest.approx(mean, abs=2e-4)


def test_smollm2_has_210_layers_and_3_22_bits_on_its_mlp_at_q2a4():
    figures = summary(select(smollm2(), preset("q2a4")), smollm2())
    assert (figures["layers"], figures["mlp_layers"], figures["attn_layers"]) == (210, 90, 120)
    assert round(figures["mlp_bits_per_weight"], 2) == 3.22


def test_qwen3_has_196_layers_of_440401920_weights_and_2_67_bits_on_its_mlp_at_q2a4():
    layers = select(qwen3(), preset("q2a4"))
    figures = summary(layers, qwen3())
    assert (figures["layers"], figures["mlp_layers"], figures["attn_layers"]) == (196, 84, 112)
    assert sum(layer.weights for layer in layers) == 440_401_920
    assert round(figures["mlp_bits_per_weight"], 2) == 2.67


def test_layers_that_share_an_input_share_its_source():
    layers = select(skeleton(num_hidden_layers=1), preset("q2a4"))
    sources = {layer.name.split(".", 3)[3]: layer.source for layer in layers}
    assert sources == {
        "self_attn.q_proj": "model.layers.0.self_attn.q_proj",
        "self_attn.k_proj": "model.layers.0.self_attn.q_proj",
        "self_attn.v_proj": "model.layers.0.self_attn.q_proj",
        "self_attn.o_proj": "model.layers.0.self_attn.o_proj",
        "mlp.gate_proj": "model.layers.0.mlp.gate_proj",
        "mlp.up_proj": "model.layers.0.mlp.gate_proj",
        "mlp.down_proj": "model.layers.0.mlp.down_proj",
    }


def test_a_kind_without_codebooks_is_left_out_and_told():
    layers, model = select(skeleton(), preset("q2a16")), skeleton()
    assert {layer.role for layer in layers} == {"mlp"} and len(layers) == 6
    figures = summary(layers, model)
    assert figures["attn_layers"] == 0 and "attn_bits_per_weight" not in figures
    assert figures["bits_per_weight"] == round(bits_per_weight(layers), 4)
    attention, mlp = {"q": 8 * 8, "k": 8 * 4, "v": 8 * 4, "o": 8 * 8}, 3 * 8 * 16
    whole = sum(attention.values()) + mlp
    shares = {f"model.layers.*.self_attn.{x}_proj": count / whole for x, count in attention.items()}
    assert figures["dense"] == {name: round(share, 4) for name, share in shares.items()}


@pytest.mark.parametrize("exact", [False, True])
def test_bits_of_the_whole_model_count_sixteen_for_what_is_in_no_format(exact):
    layers = select(smollm2(), preset("q2a4"))
    quantized = sum(layer.weights for layer in layers)
    embedding, norms = 100 * 576, 61 * 576  # the tied embedding counts once
    bits = by_hand(2, 32, *SMOLLM2_MLP) * 90 * 576 * 1536 + by_hand(4, 8, *SMOLLM2_ATTENTION) * 30 * 884_736
    bits += (16 if exact else 8 + 16 / 64) * embedding + 16 * norms
    assert quantized == 90 * 576 * 1536 + 30 * 884_736
    figures = summary(layers, smollm2(), exact=exact)
    expected = bits / (quantized + embedding + norms)
    assert figures["model_bits_per_weight"] == pytest.approx(expected, abs=1e-4)
    assert figures["rounded"] == ({} if exact else {"model.embed_tokens": 8.25})


def test_a_layer_takes_bits_and_rank_of_its_kind():
    for layer in select(skeleton(num_hidden_layers=1), preset("q2a4")):
        assert layer.format == Codebook(*((2, 32) if layer.role == "mlp" else (4, 8)))


WHOLE = {
    "Bloom": ("self_attention.query_key_value", "mlp.dense_4h_to_h"),
    "Falcon": ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
    "GPT2": ("attn.c_attn", "mlp.c_proj"),
    "GPTNeoX": ("attention.query_key_value", "mlp.dense_4h_to_h"),
    "GptOss": ("self_attn.o_proj", "mlp.experts.2.down_proj"),
    "Mixtral": ("self_attn.k_proj", "mlp.experts.2.gate_up_proj"),
    "OPT": ("self_attn.out_proj", "fc2"),
    "Olmoe": ("self_attn.q_proj", "mlp.experts.0.down_proj"),
    "Phi": ("self_attn.dense", "mlp.fc1"),
    "Phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
    "Qwen2Moe": ("self_attn.v_proj", "mlp.shared_expert.up_proj"),
    "Qwen3Moe": ("self_attn.o_proj", "mlp.experts.1.gate_up_proj"),
}
OTHERS = {"pad_token_id": 0, "word_embed_proj_dim": 8, "ffn_dim": 16}


@pytest.mark.parametrize("kind", WHOLE)
def test_fused_transposed_and_stacked_projections_are_quantized_all(kind):
    known = dir(getattr(transformers, f"{kind}Config")())
    shape = {name: value for name, value in (OTHERS | EXPERTS).items() if name in known}
    model = skeleton(kind, **shape | ({"num_key_value_heads": 2} if kind == "Phi" else {}))
    layers = select(model, preset("q2a4"))
    for role, name in zip(("attn", "mlp"), WHOLE[kind], strict=True):
        assert [layer.role for layer in layers if layer.name.endswith(f".1.{name}")] == [role]
    assert not summary(layers, model)["dense"]
    apart = re.compile(r"embed|wte|wpe|lm_head|bias|norm|ln_|router|gate\.|shared_expert_gate|sinks")
    assert sum(layer.weights for layer in layers) == sum(
        p.numel() for name, p in model.named_parameters() if not apart.search(name)
    )


def test_what_an_expert_reads_has_its_own_source():
    layers = {layer.name: layer.source for layer in select(skeleton("Mixtral", **EXPERTS), preset("q2a4"))}
    assert all(layers[name] == name for name in layers if ".experts." in name)
    assert len(layers) == 2 * (4 + 3 * 2)


def with_another_layer(kind=nn.Linear):
    """A model with a projection in every decoder layer whose name says nothing."""
    model = copy.deepcopy(skeleton())
    for layer in model.model.layers:
        layer.gizmo = kind(8, 64, bias=False, device="meta")
    return model


def test_a_layer_that_no_rule_fits_is_refused_with_its_share_and_the_remedies():
    model, quant = with_another_layer(), preset("q2a16")
    share = 8 * 64 / (8 * 64 + 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16)
    said = (
        rf"quant=q2a16 does not cover model\.layers\.\*\.gizmo \({share:.1%}\) of this model: {share:.0%} of its"
        r" decoder's weights would stay dense\. Add a rule for them to qat/quant/architectures\.py, or .*"
        r"quant\.partial=true$"
    )
    with pytest.raises(ConfigError, match=said):
        select(model, quant)
    layers = select(model, replace(quant, partial=True))
    assert {layer.role for layer in layers} == {"mlp"}
    assert summary(layers, model)["dense"]["model.layers.*.gizmo"] == round(share, 4)


def test_what_stays_dense_on_purpose_is_told_and_not_refused():
    shape = {"head_dim": 4, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
    shape |= {"linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
    model = skeleton.__wrapped__("Qwen3_5Text", **shape)
    layers = select(model, preset("q2a4"))
    assert {"in_proj_qkv", "in_proj_z", "out_proj"} < {layer.name.rpartition(".")[2] for layer in layers}
    told = summary(layers, model)["dense"]
    assert set(told) == {f"model.layers.*.linear_attn.in_proj_{x}" for x in "ab"}


def test_a_class_of_linear_layers_is_known_by_what_it_computes():
    class Renamed(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for kind, taken in ((Renamed, True), (Scaled, False)):
        model = copy.deepcopy(skeleton(num_hidden_layers=1))
        model.model.layers[0].self_attn.o_proj = kind(8, 8, bias=False, device="meta")
        if taken:
            assert len(select(model, preset("q2a4"))) == 7
            continue
        with pytest.raises(ConfigError, match=r"does not cover model\.layers\.\*\.self_attn\.o_proj"):
            select(model, preset("q2a4"))
        assert len(select(model, preset("q2a16"))) == 3  # attention is not asked for


def test_a_transposed_weight_is_seen_as_outputs_by_inputs():
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = matrix(model, "transformer.h.0.attn.c_attn")
    assert found.shape == (24, 8)
    x = torch.randn(3, 8)
    module = model.transformer.h[0].attn.c_attn
    assert torch.allclose(module(x), nn.functional.linear(x, found, bias(model, "transformer.h.0.attn.c_attn")))


def test_a_model_in_which_no_rule_fits_is_refused_with_what_it_has():
    model = with_another_layer()
    for layer in model.model.layers:
        del layer.mlp, layer.self_attn
    with pytest.raises(ConfigError, match=r"quant=q2a4 finds no layer .* which has model\.layers\.\*\.gizmo \(100"):
        select(model, preset("q2a4"))


def test_what_shapes_no_student_is_not_recorded():
    @dataclass
    class Hasty(QuantConfig):
        threads: int = key(1, "that fit at once", low=1, neutral=True)

    plain = QuantConfig("q2a16", mlp=WeightConfig(2, 32))
    assert recorded(Hasty("q2a16", mlp=WeightConfig(2, 32), partial=True, threads=8)) == recorded(plain)
    nothing = {"attn": None, "embed": None, "head": None}
    assert recorded(plain) == {"name": "q2a16", "mlp": {"bits": 2, "rank": 32}} | nothing


EMBED, OTHER = WeightConfig(bits=4, rank=2), WeightConfig(bits=3, rank=2)


@pytest.mark.parametrize(
    ("tied", "chosen", "roles"),
    [
        (True, {"embed": EMBED}, {"model.embed_tokens": "embed"}),
        (True, {"embed": EMBED, "head": EMBED}, {"model.embed_tokens": "embed"}),
        (False, {"embed": EMBED, "head": OTHER}, {"model.embed_tokens": "embed", "lm_head": "head"}),
        (False, {"embed": EMBED, "partial": True}, {"model.embed_tokens": "embed"}),
        (False, {"head": OTHER, "partial": True}, {"lm_head": "head"}),
    ],
)
def test_embedding_and_head_are_one_layer_where_they_are_one_tensor(tied, chosen, roles):
    model = skeleton(tie_word_embeddings=tied)
    layers = select(model, QuantConfig("x", mlp=OTHER, **chosen))
    outer = {layer.name: layer for layer in layers if layer.role in ("embed", "head")}
    assert {name: layer.role for name, layer in outer.items()} == roles
    weights = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(16 * (2 * 108 + 2**layer.format.bits) + layer.format.bits * 800 for layer in outer.values())
    inner = [layer for layer in layers if layer.role == "mlp"]
    stored += sum(layer.format.stored_bits(*layer.shape) for layer in inner)
    others = [name for name in ("model.embed_tokens", "lm_head")[: 1 if tied else 2] if name not in outer]
    stored += (8 * 8 + 16) * 100 * len(others)  # rounded, with a scale a row: 64 does not divide it
    stored += 16 * (weights - sum(layer.weights for layer in layers) - 800 * len(others))
    figures = summary(layers, model)
    assert figures["model_bits_per_weight"] == pytest.approx(stored / weights, abs=1e-3)
    assert list(figures["rounded"]) == others


@pytest.mark.parametrize(
    ("tied", "chosen", "says"),
    [
        (True, {"embed": EMBED, "head": OTHER}, r"quant\.head is not quant\.embed.* one tensor .*set quant\.head=null"),
        (True, {"head": OTHER}, r"quant\.embed is not.* one tensor .*set quant\.embed"),
        (False, {"embed": EMBED}, r"quant\.head is not: .*two tensors.*set quant\.head too, or quant\.partial=true"),
        (False, {"head": EMBED}, r"quant\.embed is not: .*two tensors.*set quant\.embed too, or quant\.partial=true"),
    ],
)
def test_embedding_and_head_that_are_half_said_are_refused(tied, chosen, says):
    with pytest.raises(ConfigError, match=says):
        select(skeleton(tie_word_embeddings=tied), QuantConfig("x", mlp=OTHER, **chosen))


@pytest.mark.parametrize("more", [{"layers": {"lm_head": OTHER}}, {"candidates": [OTHER]}])
def test_what_a_pattern_or_a_budget_says_of_a_head_is_said(more):
    found = select(skeleton(tie_word_embeddings=False), QuantConfig("x", mlp=OTHER, embed=EMBED, **more))
    assert {layer.name for layer in found} >= {"model.embed_tokens", "lm_head"}


def test_a_head_that_is_more_than_a_linear_layer_is_refused():
    class Divided(nn.Linear):
        pass

    model = copy.deepcopy(skeleton(tie_word_embeddings=False))
    model.lm_head = Divided(8, 100, bias=False, device="meta")
    with pytest.raises(ConfigError, match=r"has Divided for its head and no plain Linear.* quant\.head=null"):
        select(model, QuantConfig("x", mlp=OTHER, embed=EMBED, head=OTHER))
