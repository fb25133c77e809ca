import copy
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
from qat.quant.architectures import bits_per_weight, recorded, select, summary
from qat.quant.formats import Codebook


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


def smollm2() -> PreTrainedModel:
    return skeleton(
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


def test_bits_of_the_whole_model_count_sixteen_for_what_is_not_quantized():
    layers = select(smollm2(), preset("q2a4"))
    quantized = sum(layer.weights for layer in layers)
    rest = 100 * 576 + 61 * 576  # the tied embedding once, and all norms
    expected = (by_hand(2, 32, *SMOLLM2_MLP) * 90 * 576 * 1536 + by_hand(4, 8, *SMOLLM2_ATTENTION) * 30 * 884_736) / (
        quantized + rest
    ) + 16 * rest / (quantized + rest)
    assert quantized == 90 * 576 * 1536 + 30 * 884_736
    assert summary(layers, smollm2())["model_bits_per_weight"] == pytest.approx(expected, abs=1e-4)


def test_a_layer_takes_bits_and_rank_of_its_kind():
    for layer in select(skeleton(num_hidden_layers=1), preset("q2a4")):
        assert layer.format == Codebook(*((2, 32) if layer.role == "mlp" else (4, 8)))


@pytest.mark.parametrize(
    ("kind", "shape", "left", "share"),
    [
        ("Phi3", {"pad_token_id": 0}, ("mlp.gate_up_proj (44.4%)", "self_attn.qkv_proj (22.2%)"), "67%"),
        ("Mixtral", EXPERTS, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), "84%"),
        ("Qwen3Moe", EXPERTS | {"head_dim": 4}, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), "57%"),
        ("Phi", {"num_key_value_heads": 2}, ("mlp.fc1", "mlp.fc2", "self_attn.dense"), "62%"),
        ("OPT", {"word_embed_proj_dim": 8, "ffn_dim": 16}, ("fc1", "fc2", "self_attn.out_proj"), "62%"),
    ],
)
def test_a_model_with_projections_of_other_names_is_refused_by_name_unless_part_of_it_will_do(kind, shape, left, share):
    model, quant = skeleton(kind, **shape), preset("q2a4")
    with pytest.raises(ConfigError, match=rf"{share} of its decoder's weights .*quant\.partial=true") as refused:
        select(model, quant)
    assert all(f"layers.*.{name}" in str(refused.value) for name in left)
    layers = select(model, replace(quant, partial=True))
    told = summary(layers, model)["dense"]
    assert {pattern.partition(".*.")[2] for pattern in told} == {name.partition(" ")[0] for name in left}
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "lm_head" not in n]
    kept = sum(p.numel() for p in matrices if p.shape == (3, 8))  # what chooses experts
    whole = sum(p.numel() for p in matrices)
    quantized = sum(layer.weights for layer in layers)
    assert sum(told.values()) == pytest.approx(1 - (quantized + kept) / whole, abs=1e-3)


def test_a_part_that_stays_dense_on_purpose_may_have_any_names():
    """The attention of this model is one projection, its MLP three ordinary ones."""
    model = skeleton("Phi3", pad_token_id=0, num_hidden_layers=1)
    model.model.layers[0].mlp = skeleton(num_hidden_layers=1).model.layers[0].mlp
    assert {layer.role for layer in select(model, preset("q2a16"))} == {"mlp"}
    with pytest.raises(ConfigError, match=r"does not cover model\.layers\.\*\.self_attn\.qkv_proj"):
        select(model, preset("q2a4"))


def test_a_linear_layer_that_computes_something_else_is_none():
    class Scaled(nn.Linear):
        pass

    model = skeleton(num_hidden_layers=1)
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.o_proj = Scaled(8, 8, bias=False, device="meta")
    assert len(select(model, preset("q2a4"))) == 7
    with pytest.raises(ConfigError, match=r"does not cover model\.layers\.\*\.self_attn\.o_proj"):
        select(other, preset("q2a4"))


@pytest.mark.parametrize("kind", ["GPT2", "Falcon", "GPTNeoX", "Bloom"])
def test_a_model_without_such_layers_is_refused_with_the_names_that_it_has(kind):
    told = r"quant=q2a4 finds no layer .*gate_proj.* but (transformer\.h|gpt_neox\.layers)\.\*"
    with pytest.raises(ConfigError, match=told):
        select(skeleton(kind, hidden_size=8), preset("q2a4"))


def test_what_shapes_no_student_is_not_recorded():
    @dataclass
    class Hasty(QuantConfig):
        threads: int = key(1, "that fit at once", low=1, neutral=True)

    plain = QuantConfig("q2a16", mlp=WeightConfig(2, 32))
    assert recorded(Hasty("q2a16", mlp=WeightConfig(2, 32), partial=True, threads=8)) == recorded(plain)
    nothing = {"attn": None, "embed": None, "head": None}
    assert recorded(plain) == {"name": "q2a16", "mlp": {"bits": 2, "rank": 32}} | nothing
