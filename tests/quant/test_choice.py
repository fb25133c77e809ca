import pytest

from qat.config import QuantConfig, WeightConfig, WeightFormat
from qat.errors import ConfigError
from qat.quant.architectures import recorded, select
from qat.quant.formats import Codebook, GroupGrid

TWO, THREE, FOUR = (WeightConfig(bits=bits, rank=2) for bits in (2, 3, 4))
GRID = WeightConfig(bits=4, format=WeightFormat.grid, group=16)


def formats(teacher, **settings):
    layers = select(teacher.skeleton(), QuantConfig(name="own", **settings))
    return {layer.name: layer.format for layer in layers}


def test_the_last_pattern_that_fits_decides_and_else_the_role(teacher):
    patterns = {"model.layers.0.*": THREE, "*.down_proj": GRID, "model.layers.1.mlp.down_proj": FOUR}
    found = formats(teacher, mlp=TWO, layers=patterns)
    assert found["model.layers.0.self_attn.q_proj"] == found["model.layers.0.mlp.up_proj"] == Codebook(3, 2)
    assert found["model.layers.0.mlp.down_proj"] == GroupGrid(4, 16)
    assert found["model.layers.1.mlp.down_proj"] == Codebook(4, 2)
    assert found["model.layers.1.mlp.up_proj"] == Codebook(2, 2)
    assert "model.layers.1.self_attn.q_proj" not in found


def test_null_keeps_layers_dense_and_is_no_gap(teacher):
    found = formats(teacher, mlp=TWO, attn=FOUR, layers={"*.0.*": None, "*.0.*.v_proj": THREE})
    assert [name for name in found if ".0." in name] == ["model.layers.0.self_attn.v_proj"]
    assert len([name for name in found if ".1." in name]) == 7


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("model.layer.0.mlp.up_proj", "did you mean model.layers.0.mlp.up_proj?"),
        ("model.layer.1.*", "did you mean model.layers.1.*?"),
        ("*.upproj", "did you mean *.up_proj?"),
        ("*.0.attn.q_proj", "did you mean *.0.self_attn.q_proj?"),
        ("*.gate", "model.layers"),
        ("?", "model.layers"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_with_the_nearest(teacher, pattern, nearest):
    with pytest.raises(ConfigError) as raised:
        formats(teacher, mlp=TWO, layers={pattern: FOUR})
    assert f"quant.layers[{pattern}] fits no layer" in str(raised.value) and nearest in str(raised.value)


def test_the_head_of_a_tied_pair_is_refused_with_the_name_of_the_two(teacher):
    with pytest.raises(ConfigError, match=r"\[lm_head\] has its weight in model\.embed_tokens, to which"):
        formats(teacher, mlp=TWO, layers={"lm_head": FOUR})


def test_what_is_written_for_a_layer_shapes_the_key_and_nothing_else_does():
    plain = QuantConfig(name="own", mlp=TWO)
    assert "layers" not in recorded(plain) and "candidates" not in recorded(plain)
    other = QuantConfig(name="own", mlp=TWO, layers={"*.up_proj": GRID}, partial=True)
    assert recorded(other) == recorded(plain) | {"layers": {"*.up_proj": GroupGrid(4, 16).settings()}}
