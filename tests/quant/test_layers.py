from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from torch import nn

from qat.config import QuantConfig, TableConfig
from qat.errors import ConfigError
from qat.quant.layers import bits_per_weight, select, summary


def skeleton(layers: int, hidden: int, inner: int, query: int, kv: int) -> nn.Module:
    """The linear layers of a decoder, without memory behind them."""

    def linear(outputs: int, inputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, device="meta")

    def decoder_layer() -> nn.Module:
        block = nn.Module()
        block.self_attn, block.mlp = nn.Module(), nn.Module()
        block.self_attn.q_proj, block.self_attn.o_proj = linear(query, hidden), linear(hidden, query)
        block.self_attn.k_proj, block.self_attn.v_proj = linear(kv, hidden), linear(kv, hidden)
        block.mlp.gate_proj, block.mlp.up_proj = linear(inner, hidden), linear(inner, hidden)
        block.mlp.down_proj = linear(hidden, inner)
        return block

    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(decoder_layer() for _ in range(layers))
    model.lm_head = linear(100, hidden)
    return model


def smollm2() -> nn.Module:
    return skeleton(30, 576, 1536, 576, 192)


def qwen3() -> nn.Module:
    return skeleton(28, 1024, 3072, 2048, 1024)


def preset(name: str) -> QuantConfig:
    """A preset as the command line gives it."""
    conf = Path(__file__).resolve().parents[2] / "conf" / "quant"
    with initialize_config_dir(str(conf), version_base="1.3"):
        values = compose(name)
    kinds = {kind: TableConfig(**values[kind]) if values[kind] else None for kind in ("mlp", "attn")}
    return QuantConfig(name=values.name, **kinds)


def by_hand(bits: int, rank: int, *shapes: tuple[int, int]) -> float:
    """16-bit scales and a 16-bit table on top of the indices, over all weights of some layers."""
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
    figures = summary(select(model(), preset(name)))
    assert figures["mlp_bits_per_weight"] == pytest.approx(by_hand(*mlp, *mlp_shapes), abs=1e-4)
    assert figures["attn_bits_per_weight"] == pytest.approx(by_hand(*attention, *attention_shapes), abs=1e-4)
    weights = [sum(o * i for o, i in shapes) for shapes in (mlp_shapes, attention_shapes)]
    mean = (figures["mlp_bits_per_weight"] * weights[0] + figures["attn_bits_per_weight"] * weights[1]) / sum(weights)
    assert figures["bits_per_weight"] == pytest.approx(mean, abs=2e-4)


def test_smollm2_has_210_layers_and_3_22_bits_on_its_mlp_at_q2a4():
    figures = summary(select(smollm2(), preset("q2a4")))
    assert (figures["layers"], figures["mlp_layers"], figures["attn_layers"]) == (210, 90, 120)
    assert round(figures["mlp_bits_per_weight"], 2) == 3.22


def test_qwen3_has_196_layers_of_440401920_weights_and_2_67_bits_on_its_mlp_at_q2a4():
    layers = select(qwen3(), preset("q2a4"))
    figures = summary(layers)
    assert (figures["layers"], figures["mlp_layers"], figures["attn_layers"]) == (196, 84, 112)
    assert sum(layer.weights for layer in layers) == 440_401_920
    assert round(figures["mlp_bits_per_weight"], 2) == 2.67


def test_layers_that_share_an_input_share_its_source():
    sources = {layer.name.split(".", 3)[3]: layer.source for layer in select(skeleton(1, 8, 16, 8, 4), preset("q2a4"))}
    assert sources == {
        "self_attn.q_proj": "model.layers.0.self_attn.q_proj",
        "self_attn.k_proj": "model.layers.0.self_attn.q_proj",
        "self_attn.v_proj": "model.layers.0.self_attn.q_proj",
        "self_attn.o_proj": "model.layers.0.self_attn.o_proj",
        "mlp.gate_proj": "model.layers.0.mlp.gate_proj",
        "mlp.up_proj": "model.layers.0.mlp.gate_proj",
        "mlp.down_proj": "model.layers.0.mlp.down_proj",
    }


def test_a_kind_without_tables_is_left_out():
    layers = select(skeleton(2, 8, 16, 8, 4), preset("q2a16"))
    assert {layer.kind for layer in layers} == {"mlp"} and len(layers) == 6
    assert summary(layers)["attn_layers"] == 0 and "attn_bits_per_weight" not in summary(layers)
    assert summary(layers)["bits_per_weight"] == round(bits_per_weight(layers), 4)


def test_a_layer_takes_bits_and_rank_of_its_kind():
    for layer in select(skeleton(1, 8, 16, 8, 4), preset("q2a4")):
        assert (layer.bits, layer.rank) == ((2, 32) if layer.kind == "mlp" else (4, 8))


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match=r"quant=q2a4 .*gate_proj"):
        select(nn.Sequential(nn.Linear(2, 2)), preset("q2a4"))
