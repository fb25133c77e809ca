"""Checkpoints of the older scripts: every variant of the layout computes what the older code computes."""

import copy
import json
import logging
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qat import checkpoints
from qat.checkpoints import v2
from qat.errors import ArtifactError
from qat.quant.linear import quantized
from tests import tiny
from tests.checkpoints.conftest import Variant, write

IDS = torch.arange(60).reshape(3, 20)
LAYER = "model.layers.0.mlp.gate_proj"


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def difference(model, expected):
    theirs = logits(expected)
    return float((logits(model) - theirs).norm() / theirs.norm())


def edit(file, change):
    """Writes a state dict again with a change made to it."""
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


variants = st.builds(
    Variant,
    seed=st.integers(0, 99),
    entries=st.fixed_dictionaries({"mlp": st.sampled_from([2, 3, 4, 16]), "self_attn": st.sampled_from([4, 13, 16])}),
    ranks=st.fixed_dictionaries({"mlp": st.integers(1, 9), "self_attn": st.integers(1, 5)}),
    baked=st.sampled_from([None, 0, 1]),
    stored=st.sampled_from(
        [("weight", "_Q", "_indices"), ("weight", "_Q"), ("weight", "_indices"), ("weight",), ("_indices",), ("_Q",)]
    ),
    index_type=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]),
    value_type=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    ascending=st.booleans(),
    positive=st.sampled_from([None, "abs", "softplus"]),
    magnitude=st.sampled_from(["identity", "abs", "softplus"]),
    config=st.booleans(),
    nested=st.booleans(),
    others=st.booleans(),
)


@settings(max_examples=30)
@given(variants)
def test_every_variant_computes_what_the_older_code_does(teacher, variant):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "best_state_dict.pt"
        expected = write(variant, teacher, file)
        student, manifest = checkpoints.load(file, teacher, tiny.FP32)
        assert difference(student, expected) < 1e-5
        for layer in checkpoints.layers_of(manifest):
            kind = "mlp" if layer.role == "mlp" else "self_attn"
            bits = layer.format.bits
            assert (2**bits >= variant.entries[kind] > 2 ** (bits - 1)) or variant.entries[kind] == 2
            assert layer.format.rank == variant.ranks[kind]


def test_the_stored_indices_are_taken_exactly(old, teacher):
    file, _ = old(ascending=False)
    state = torch.load(file, weights_only=True)
    for name, module in quantized(checkpoints.load(file, teacher, tiny.FP32)[0]).items():
        assert torch.equal(module.indices.long(), state[f"{name}._indices"])
        assert torch.equal(module.codebook, state[f"{name}.lut"])


def test_a_file_its_folder_and_folders_around_it_are_one_checkpoint(old, teacher, tmp_path):
    file, expected = old()
    wrapped = tmp_path / "pulled" / "q4" / "q4"
    shutil.copytree(file.parent, wrapped)
    for path in (file, file.parent, wrapped, tmp_path / "pulled"):
        assert difference(checkpoints.load(path, teacher, tiny.FP32)[0], expected) < 1e-5


def test_saved_in_our_layout_it_stays_the_same_model(old, teacher, tmp_path):
    file, expected = old()
    student, manifest = checkpoints.load(file, teacher, tiny.FP32)
    checkpoints.save(student, tmp_path / "ours", checkpoints.heritage(manifest))
    again, described = checkpoints.load(tmp_path / "ours", teacher, tiny.FP32)
    assert difference(again, expected) < 1e-5
    roles = {"mlp": {"bits": 2, "rank": 4}, "attn": {"bits": 4, "rank": 2}, "embed": None, "head": None}
    assert described["quant"] == {"name": "q2a4", **roles}
    own = checkpoints.own_parameters(again)
    assert torch.equal(own["model.norm.weight"], expected.model.norm.weight)


def test_its_own_parameters_are_kept_exactly_whatever_it_runs_in(old, teacher, tmp_path):
    file, expected = old()
    half = tiny.Machine(tiny.CPU, torch.bfloat16, 4)
    student, manifest = checkpoints.load(file, teacher, half)
    assert student.model.norm.weight.dtype is torch.bfloat16
    checkpoints.save(student, tmp_path / "ours", checkpoints.heritage(manifest))
    again, _ = checkpoints.load(tmp_path / "ours", teacher, tiny.FP32)
    assert difference(again, expected) < 1e-5


def test_parameters_equal_to_the_teachers_are_not_kept_twice(old, teacher, tmp_path):
    file, _ = old(others=False)
    plain = teacher.load(torch.float32, tiny.CPU).state_dict()
    edit(file, lambda state: state.update({k: v for k, v in plain.items() if "_proj" not in k}))
    student, manifest = checkpoints.load(file, teacher, tiny.FP32)
    checkpoints.save(student, tmp_path / "ours", checkpoints.heritage(manifest))
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["manifest.json", "tables.safetensors"]


def test_latent_weights_are_those_of_the_quantized_layers(old, teacher):
    file, expected = old()
    latent = checkpoints.latent(file)
    assert latent.keys() == quantized(checkpoints.load(file, teacher, tiny.FP32)[0]).keys()
    for name, weight in latent.items():
        assert torch.equal(weight, expected.get_parameter(f"{name}.weight"))


def test_without_latent_weights_there_are_none(old):
    assert checkpoints.latent(old(stored=("_indices",))[0]) == {}


def test_what_cannot_be_honoured_is_named_in_one_line(old, teacher, caplog):
    file, expected = old()
    extra = {f"{LAYER}.{part}": torch.ones(2) for part in ("lora_A", "lora_B", "A_lut", "_cached_weight_q")}
    edit(file, lambda state: state.update(extra))
    with caplog.at_level(logging.WARNING):
        student, _ = checkpoints.load(file, teacher, tiny.FP32)
    (record,) = caplog.records
    assert "not used are lora_A (1), lora_B (1), A_lut (1), _cached_weight_q (1)" in record.message
    assert difference(student, expected) < 1e-5


def remove(key):
    return lambda state: state.pop(key)


def cut(key, rows):
    return lambda state: state.update({key: state[key][:rows]})


def put(key, value):
    return lambda state: state.update({key: value})


def widen(state, rank):
    state[f"{LAYER}.scale_A"], state[f"{LAYER}.scale_B"] = torch.ones(128, rank), torch.ones(rank, 64)
    state[f"{LAYER}.rank_magnitude"] = torch.ones(rank)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (remove(f"{LAYER}.scale_A"), f"a codebook for {LAYER} but no {LAYER}.scale_A"),
        (remove(f"{LAYER}.rank_magnitude"), f"a codebook for {LAYER} but no {LAYER}.rank_magnitude"),
        (cut(f"{LAYER}.rank_magnitude", 3), f"{LAYER} has a rank_magnitude of 3 where 4 belongs"),
        (cut(f"{LAYER}.scale_A", 100), f"{LAYER} has a weight of 128×64 where 100×64 belongs"),
        (cut(f"{LAYER}._Q", 100), "a _Q of 100×64 where 128×64 belongs"),
        (put(f"{LAYER}.lut", torch.tensor(1.0)), "a codebook of 1 entries"),
        (put(f"{LAYER}.scale_B", torch.tensor(1.0)), "a scale_B of no dimensions where 4×I belongs"),
        (put(f"{LAYER}.scale_A", torch.full((128, 4), torch.nan)), "NaN or infinity in its scale_A"),
        (put(f"{LAYER}.scale_A", torch.ones(128, 4).int()), "a scale_A of int32, and floating-point numbers belong"),
        (put(f"{LAYER}._indices", torch.zeros(128, 64)), "a _indices of float32, and whole numbers belong there"),
        (put(f"{LAYER}._scales_baked_flag", torch.zeros(2)), "a _scales_baked_flag of 2 where 1 belongs"),
        (lambda state: widen(state, 65), "scales of rank 65, and its weight is 128×64"),
        (put(f"{LAYER}._indices", torch.full((128, 64), 4)), "indices from 4 to 4 and 4 codebook entries"),
        (put(f"{LAYER}._Q", torch.zeros(128, 64)), "away from its codebook's entries"),
        (put(f"{LAYER}.lut", torch.zeros(300)), "a codebook of 300 entries"),
        (put("lm_head.lut", torch.zeros(4)), "a codebook for lm_head: only gate_proj"),
        (put("lm_head.weight", torch.zeros(512, 64)), "lm_head.weight differs from model.embed_tokens.weight"),
        (put("model.norm.weight", torch.zeros(32)), "model.norm.weight is 32 in the checkpoint and 64 here"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(old, teacher, change, says):
    file, _ = old()
    edit(file, change)
    with pytest.raises(ArtifactError, match=says.replace("(", r"\(")):
        checkpoints.load(file, teacher, tiny.FP32)


def test_a_layer_of_which_nothing_is_known_is_refused(old, teacher):
    file, _ = old(stored=())
    with pytest.raises(ArtifactError, match=f"{LAYER.replace('mlp.gate', 'self_attn.q')} has neither"):
        checkpoints.load(file, teacher, tiny.FP32)


class Shrunk:
    """A teacher with one layer less or one more than the checkpoint was made for."""

    def __init__(self, teacher, layers):
        self.inner, self.layers = teacher, layers

    def skeleton(self):
        return self.load(torch.float32, tiny.CPU)

    def load(self, dtype, device):
        model = self.inner.load(dtype, device)
        layers = [*model.model.layers, *copy.deepcopy(model.model.layers)]
        model.model.layers = nn.ModuleList(layers[: self.layers])
        return model


@pytest.mark.parametrize(
    ("layers", "says"),
    [(1, "the model has no linear layer model.layers.1"), (3, "it has nothing for model.layers.2.self_attn.q_proj")],
)
def test_a_model_of_another_depth_is_refused(old, teacher, layers, says):
    file, _ = old()
    with pytest.raises(ArtifactError, match=f"made from someone/tiny.*{says}"):
        checkpoints.load(file, Shrunk(teacher, layers), tiny.FP32)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"version": "v1"}, "version v1"),
        ({"force_positive_scales": True, "positive_scale_method": "exp"}, "activation exp"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(old, teacher, settings, says):
    file, _ = old()
    (file.parent / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ArtifactError, match=says):
        checkpoints.load(file, teacher, tiny.FP32)


def test_a_pickle_with_more_than_tensors_is_not_opened(tmp_path):
    torch.save({"x.lut": torch.zeros(4), "module": nn.Linear(2, 2)}, tmp_path / "best_state_dict.pt")
    with pytest.raises(ArtifactError, match="plain tensors"):
        v2.read(tmp_path / "best_state_dict.pt")


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04cut short"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read"):
        v2.read(tmp_path / "x.pt")


def test_a_state_dict_without_codebooks_is_refused(tmp_path):
    torch.save({"model.norm.weight": torch.ones(4)}, tmp_path / "x.pt")
    with pytest.raises(ArtifactError, match="no V2 checkpoint"):
        v2.read(tmp_path / "x.pt")


def test_of_several_state_dicts_one_must_be_named(old, teacher):
    file, _ = old()
    shutil.copy(file, file.with_name("other.pt"))
    assert checkpoints.load(file.parent, teacher, tiny.FP32)  # `best_state_dict.pt` says it is the one
    file.rename(file.with_name("one.pt"))
    with pytest.raises(ArtifactError, match=r"one.pt, other.pt"):
        checkpoints.load(file.parent, teacher, tiny.FP32)
