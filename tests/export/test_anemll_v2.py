import json

import pytest
import torch

from qat import checkpoints
from qat.export.anemll_v2 import writer as anemll_v2
from qat.export.source import open_source
from qat.quant.linear import quantized
from tests import tiny
from tests.checkpoints.conftest import Variant, write
from tests.export.conftest import IDS


def weight(state, layer):
    """W as the layout defines it, in float64."""
    A, B, g = (state[f"{layer}.{part}"].double() for part in ("scale_A", "scale_B", "rank_magnitude"))
    if not state[f"{layer}._scales_baked_flag"]:
        A, B = A / A.norm(dim=0).clamp_min(1e-6), B / B.norm(dim=1, keepdim=True).clamp_min(1e-6)
    return state[f"{layer}.lut"].double()[state[f"{layer}._indices"]] * (A @ torch.diag(g) @ B)


@pytest.fixture(params=["fp32", "fp16"])
def exported(request, best, export):
    folder = export(best, "anemll_v2", request.param)
    return request.param, folder, torch.load(folder / anemll_v2.FILE, weights_only=True)


@torch.no_grad()
def test_weights_are_those_of_the_student(exported, student):
    dtype, _, state = exported
    for layer, module in quantized(student).items():
        expected = module.weight(torch.float32).double()
        error = (weight(state, layer) - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == "fp32" else 1e-3), layer


@torch.no_grad()
def test_it_reads_back_to_equal_weights(exported, teacher):
    _, folder, state = exported
    again, _ = checkpoints.load(folder, teacher, tiny.FP32)
    for layer, module in quantized(again).items():
        assert torch.equal(module.indices.long(), state[f"{layer}._indices"])
        assert torch.equal(module.codebook, state[f"{layer}.lut"].float())
        expected = weight(state, layer)
        assert (module.weight(torch.float32) - expected).norm() < 1e-6 * expected.norm()
    assert not checkpoints.own_parameters(again)


@torch.no_grad()
def test_snapped_is_exact_in_fp16(best, teacher, export, tmp_path):
    folder = export(best, "anemll_v2", "fp16")
    state = torch.load(folder / anemll_v2.FILE, weights_only=True)
    for name, value in state.items():
        if name.endswith(("scale_A", "scale_B", "lut", "rank_magnitude", "_Q")):
            assert value.dtype is torch.float16
        if name.endswith("rank_magnitude"):
            assert torch.equal(value, torch.ones_like(value))
        if name.endswith("_flag"):
            assert (value.dtype, value.shape, int(value)) == (torch.int8, (), 1)
    first, _ = checkpoints.load(folder, teacher, tiny.FP32)
    for layer, module in quantized(first).items():
        assert torch.equal(module.scale_A, state[f"{layer}.scale_A"].float())
        assert torch.equal(module.scale_B, state[f"{layer}.scale_B"].float())


def test_every_key_of_the_layout_is_there(exported, teacher, student):
    _, folder, state = exported
    parts = {"weight", "scale_A", "scale_B", "rank_magnitude", "lut", "_Q", "_indices", "_scales_baked_flag"}
    wanted = {f"{layer}.{part}" for layer in quantized(student) for part in parts}
    wanted |= {name for name in teacher.load(torch.float32, tiny.CPU).state_dict() if "_proj" not in name}
    assert state.keys() == wanted
    assert all(
        torch.equal(state[k], state[k.replace("_Q", "lut")][state[k.replace("_Q", "_indices")]])
        for k in wanted
        if k.endswith("_Q")
    )
    said = json.loads((folder / "config.json").read_text())
    assert said["version"] == "v2" and said["force_positive_scales"] is False
    assert (said["mlp_lut_bits"], said["attn_lut_bits"]) == (2, 4)
    assert (said["mlp_scale_rank"], said["attn_scale_rank"]) == (4, 2)


@torch.no_grad()
def test_an_old_checkpoint_goes_round_unchanged(teacher, export, tmp_path):
    file = tmp_path / "old" / "best_state_dict.pt"
    expected = write(Variant(positive="softplus", magnitude="softplus", ascending=False), teacher, file)
    folder = export(file, "anemll_v2")
    again, _ = checkpoints.load(folder, teacher, tiny.FP32)
    assert (again(IDS).logits - expected(IDS).logits).norm() < 1e-5 * expected(IDS).logits.norm()
    assert json.loads((folder / "config.json").read_text())["model_id"] == "someone/tiny"
    latent, before = checkpoints.latent(folder / anemll_v2.FILE), checkpoints.latent(file)
    assert all(torch.equal(latent[name], before[name]) for name in before)


def test_the_file_is_no_larger_than_its_tensors(best, teacher):
    """Views into larger storages would be saved whole."""
    state = anemll_v2.state_dict(open_source(teacher, best), snapped=True)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    tied = state["model.embed_tokens.weight"].nbytes
    assert sum(storages.values()) == sum(value.nbytes for value in state.values()) - tied
