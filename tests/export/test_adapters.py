"""Adapters of a checkpoint on its exports, by PEFT itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import qat
from qat import checkpoints
from qat.config import ExportConfig
from qat.errors import ConfigError
from qat.export.exporter import exporter
from qat.quant import adapter
from tests import tiny
from tests.export.conftest import IDS


@pytest.fixture(scope="module")
def adapted(best, teacher, tmp_path_factory):
    """A checkpoint whose adapters add something."""
    student, manifest = checkpoints.load(best, teacher, tiny.FP32)
    adapter.begin(checkpoints.adaptable(student), 3, 6.0, 0)
    for number, one in enumerate(adapter.adapters(student).values()):
        with torch.no_grad():
            one.B.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    folder = tmp_path_factory.mktemp("adapted") / "best"
    checkpoints.save(student, folder, checkpoints.heritage(manifest))
    return folder


@pytest.fixture(scope="module")
def logits(adapted, teacher):
    """What the checkpoint says with its adapters."""
    with torch.no_grad():
        return checkpoints.load(adapted, teacher, tiny.FP32)[0](IDS).logits


def near(one, other, bound=1e-5):
    return float((one.double() - other).norm() / other.norm()) < bound


@pytest.mark.parametrize(("name", "changes", "bound"), [("hf", {}, 1e-5), ("packed", {"dense": True}, 2e-3)])
@torch.no_grad()
def test_peft_puts_them_on_an_export(adapted, best, teacher, export, logits, name, changes, bound):
    peft = pytest.importorskip("peft")
    folder = export(adapted, name, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert near(model(IDS).logits, checkpoints.load(best, teacher, tiny.FP32)[0](IDS).logits, bound)
    assert not near(model(IDS).logits, logits, 20 * bound)
    with_them = peft.PeftModel.from_pretrained(model, adapted)
    assert near(with_them(IDS).logits, logits, bound)
    with with_them.disable_adapter():
        assert not near(with_them(IDS).logits, logits, 20 * bound)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter")
    assert torch.equal(again(IDS).logits, with_them(IDS).logits)
    assert f'"{folder.name}/adapter"' in (folder / "README.md").read_text()


@torch.no_grad()
def test_the_library_loads_them(adapted, export, tmp_path, logits):
    words = ["instance=cpu", "instance.precision=fp32"]
    assert near(qat.load(adapted, model="tiny", outputs=tmp_path, overrides=words).model(IDS).logits, logits)
    pytest.importorskip("peft")
    assert near(qat.load(export(adapted, "hf"), overrides=words).model(IDS).logits, logits)


def test_what_peft_saves_again_is_what_was_written(adapted, export, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(export(adapted, "hf")), adapted)
    model.save_pretrained(tmp_path / "saved")
    name = "adapter_model.safetensors"
    assert (tmp_path / "saved" / name).read_bytes() == (adapted / name).read_bytes()
    theirs, ours = (json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path / "saved", adapted))
    assert sorted(theirs["target_modules"]) == ours["target_modules"]
    own = ours.keys() - {"target_modules", "base_model_name_or_path"}
    assert {key: theirs[key] for key in own} == {key: ours[key] for key in own}


def test_peft_trains_on_a_packed_export_and_merges_into_none(adapted, export):
    peft = pytest.importorskip("peft")
    folder = export(adapted, "packed", dense=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model(IDS, labels=IDS).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None for grad in grads.values()) and len(grads) == 2 * 2 * 2
    assert any(bool(grad.any()) for grad in grads.values())
    with pytest.raises(ConfigError, match=r"export=hf export\.merge=true"):
        model.merge_and_unload()


@torch.no_grad()
def test_merged_they_are_part_of_a_dense_model(adapted, export, logits):
    folder = export(adapted, "hf", merge=True)
    assert not (folder / "adapter").exists()
    assert near(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, logits)


@pytest.mark.parametrize(
    ("adapted", "name", "merge", "said"),
    [
        (True, "packed", True, "export.merge=true: export=packed holds weights of few bits"),
        (True, "mlx", True, "export.merge=true: export=mlx holds weights of few bits"),
        (False, "hf", True, "export.merge=true: the checkpoint has no adapters"),
        (True, "gguf", False, "export=gguf has no place for adapters: use export=hf or export=packed"),
        (True, "anemll_v2", False, "export=anemll_v2 has no place for adapters"),
    ],
)
def test_where_they_have_no_place_it_is_said(adapted, name, merge, said):
    with pytest.raises(ConfigError) as refused:
        exporter(name).refuse_adapters(adapted, ExportConfig(name, name, merge=merge))
    assert str(refused.value).startswith(said)
