import json

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("coremltools", reason="the extra `coreml` is not installed")

from qat.errors import ArtifactError, UnavailableError
from qat.export.coreml import writer as coreml
from qat.export.coreml.interpreter import Interpreted
from qat.export.coreml.program import Decoder
from qat.quant.linear import quantized

IDS = torch.arange(7, 31)[None]


@pytest.fixture(params=["factored", "baked"])
def exported(request, best, export):
    from qat.config import ScaleForm

    return request.param, export(best, "coreml", "fp16", scales=ScaleForm[request.param], context=64)


@torch.no_grad()
def test_the_package_computes_the_students_logits(exported, student):
    _, folder = exported
    logits, expected = Interpreted(folder / coreml.PACKAGE)(IDS).logits, student(IDS).logits
    assert (logits - expected).norm() < 5e-3 * expected.norm()


def test_codebooks_stay_codebooks_only_when_factored(exported, student):
    form, folder = exported
    report = json.loads((folder / "report.json").read_text())
    codebooks = report["operations"].get("constexpr_lut_to_dense", 0)
    assert codebooks == (len(quantized(student)) if form == "factored" else 0)
    assert report["scales"] == form and report["bytes"] > 0
    weights = sum(module.indices.numel() for module in quantized(student).values())
    others = sum(p.numel() for n, p in student.named_parameters() if "_proj" not in n) * 2
    if form == "factored":
        assert report["bytes"] < others + weights * 2 * 0.6 + 150_000
    else:
        assert report["bytes"] > others + weights * 2


def test_the_reference_and_its_script_lie_beside_it(exported, student):
    _, folder = exported
    recorded = np.load(folder / "reference.npz")
    with torch.no_grad():
        expected = student(torch.from_numpy(recorded["input_ids"])[None]).logits[0].numpy()
    assert np.allclose(recorded["logits"], expected, rtol=1e-3, atol=1e-2)
    compile((folder / "check.py").read_text(), "check.py", "exec")
    assert (folder / "tokenizer.json").is_file()


def test_a_package_that_computes_something_else_is_not_published(best, export, monkeypatch, tmp_path):
    from qat.export.coreml import program

    monkeypatch.setattr(program, "rotated", lambda x, cos, sin: x)
    with pytest.raises(ArtifactError, match="nothing was published"):
        export(best, "coreml", "fp16", context=64)
    assert not list((tmp_path / "exports").iterdir())


@torch.no_grad()
def test_qwen3_with_norms_of_queries_and_keys(tmp_path):
    import coremltools as ct

    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.uniform_(0.5, 2)
            layer.self_attn.k_norm.weight.uniform_(0.5, 2)
    made = ct.convert(
        Decoder(model, 32, True).program(), minimum_deployment_target=ct.target.iOS18, skip_model_load=True
    )
    made.save(str(tmp_path / "m.mlpackage"))
    expected = model(IDS).logits
    assert (Interpreted(tmp_path / "m.mlpackage")(IDS).logits - expected).norm() < 5e-3 * expected.norm()


def test_another_architecture_is_refused():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)
    with pytest.raises(UnavailableError, match="this one is gpt2"):
        Decoder(transformers.AutoModelForCausalLM.from_config(config), 16, True)


@torch.no_grad()
@pytest.mark.parametrize("context", [1, 5])
def test_a_context_shorter_than_the_prompt_that_is_compared_is_written(best, export, student, context):
    folder = export(best, "coreml", "fp16", context=context)
    recorded = np.load(folder / "reference.npz")
    assert recorded["logits"].shape[0] == context
    ids = torch.from_numpy(recorded["input_ids"])[None]
    made, expected = Interpreted(folder / coreml.PACKAGE)(ids).logits, student(ids).logits
    assert (made - expected).norm() < 5e-3 * expected.norm()
