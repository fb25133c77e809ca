import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from qat.artifacts import open_artifact
from qat.errors import ArtifactError, NumericsError
from qat.export import parity
from qat.export.hf import writer as hf
from qat.quant.linear import quantized
from tests.checkpoints.conftest import Variant, write
from tests.export.conftest import IDS

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer.chat_template and model.config.use_cache and "qat" not in sys.modules
with torch.no_grad():
    torch.save((model.dtype, model(torch.arange(60).reshape(3, 20)).logits), sys.argv[2])
assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)
"""


@torch.no_grad()
def test_transformers_alone_computes_the_same_logits(best, student, export, elsewhere, tmp_path):
    folder = export(best, "hf")
    code, said = elsewhere(PLAIN, folder, tmp_path / "logits.pt")
    assert code == 0, said
    dtype, logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    expected = student(IDS).logits
    assert dtype is torch.float32 and (logits - expected).norm() < 1e-6 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_rounds_every_weight_once(best, student, export, name, dtype):
    model = hf.read(None, export(best, "hf", name))
    assert model.dtype is dtype
    for layer, module in quantized(student).items():
        values = module.codebook[module.indices.long()]
        scale = (module.scale_A * module.rank_magnitude) @ module.scale_B
        assert torch.allclose(model.get_parameter(f"{layer}.weight"), (values * scale).to(dtype), rtol=1e-2, atol=0)
    for parameter, value in student.named_parameters():
        if "_proj" not in parameter:
            assert torch.equal(model.get_parameter(parameter), value.to(dtype)), parameter


@torch.no_grad()
def test_the_teacher_is_exported_as_it_is(teacher, export):
    folder = export(None, "hf")
    expected = teacher.load(torch.float32, torch.device("cpu")).state_dict()
    exported = hf.read(None, folder).state_dict()
    assert exported.keys() == expected.keys() and all(torch.equal(exported[k], expected[k]) for k in expected)
    assert "full precision" in (folder / "README.md").read_text()


@torch.no_grad()
def test_a_v2_checkpoint_brings_its_own_norms_and_embeddings(teacher, export, tmp_path):
    file = tmp_path / "old" / "best_state_dict.pt"
    expected = write(Variant(), teacher, file)(IDS).logits
    folder = export(file, "hf")
    assert (hf.read(None, folder)(IDS).logits - expected).norm() < 1e-5 * expected.norm()
    assert "someone/tiny" in (folder / "README.md").read_text()


def test_it_has_a_card_a_manifest_and_the_tokenizer(best, teacher, export):
    folder = export(best, "hf")
    card = (folder / "README.md").read_text()
    for said in (
        "SR-007",
        "v2_q2a4_mlp_0.58_fp32",
        "0.1235",
        "| train.steps | 77 |",
        "| mode | mlp |",
        "bits a weight",
    ):
        assert said in card
    assert "None" not in card and str(folder.parent) not in card
    manifest = open_artifact(folder).manifest
    assert manifest["kind"] == "export" and manifest["parity"] < 1e-5
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == teacher.tokenizer().get_vocab()
    record = json.loads((folder.parents[1] / "SR-001" / "result.json").read_text())
    assert record["status"] == "complete" and record["paths"]["export"] == str(folder)
    assert record["metrics"]["parity"] == manifest["parity"]


def test_an_export_that_computes_something_else_is_not_published(best, export, monkeypatch, tmp_path):
    written = hf.write

    def spoiled(source, folder, settings):
        with torch.no_grad():
            next(iter(quantized(source.model).values())).codebook[0] *= 2
        written(source, folder, settings)
        with torch.no_grad():
            next(iter(quantized(source.model).values())).codebook[0] /= 2

    kept = export(best, "hf")
    before = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    monkeypatch.setattr(hf, "write", spoiled)
    with pytest.raises(ArtifactError, match="nothing was published"):
        export(best, "hf", output=kept)
    assert {file: file.stat().st_mtime_ns for file in kept.iterdir()} == before
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_an_older_export_is_replaced(best, export):
    folder = export(best, "hf")
    assert export(best, "hf", "bf16", output=folder) == folder
    assert hf.read(None, folder).dtype is torch.bfloat16


def test_a_value_too_large_for_fp16_is_told(best, teacher, export, tmp_path):
    file = tmp_path / "old" / "best_state_dict.pt"
    write(Variant(others=False), teacher, file)
    state = torch.load(file, weights_only=True)
    state["model.layers.1.self_attn.v_proj.rank_magnitude"] *= 1e7
    torch.save(state, file)
    with pytest.raises(NumericsError, match=r"v_proj has values that float16 cannot hold"):
        export(file, "hf", "fp16")


def test_parity_sees_a_single_spoiled_number(teacher, student):
    model = teacher.load(torch.float32, torch.device("cpu"))
    rows = parity.prompts(teacher)
    assert parity.check(model, model, rows, torch.float32) == 0
    other = teacher.load(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        other.model.norm.weight[3] *= 1.01
    with pytest.raises(ArtifactError, match="of their norm"):
        parity.check(model, other, rows, torch.float32)
    with torch.no_grad():
        other.model.norm.weight[3] = torch.nan
    with pytest.raises(ArtifactError):
        parity.check(model, other, rows, torch.bfloat16)


def test_only_what_is_needed_of_the_teachers_folder_is_copied(teacher, best, export, tmp_path):
    folder = shutil.copytree(teacher.path, tmp_path / "model")
    for name in ("pytorch_model.bin", "LICENSE", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "onnx").mkdir()
    made = tmp_path / "made"
    made.mkdir()
    from qat.export.source import copy_tokenizer
    from qat.models import ModelFolder

    copy_tokenizer(ModelFolder("x", folder, "0"), made)
    names = {path.name for path in made.iterdir()}
    assert "LICENSE" in names and "tokenizer.json" in names
    assert not names & {"pytorch_model.bin", "notes.txt", "onnx", "model.safetensors", "config.json", "manifest.json"}
