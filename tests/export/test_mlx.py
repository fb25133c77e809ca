"""Exports as mlx-lm itself reads them; what it cannot hold is refused before anything is written."""

import json

import pytest
import torch

from qat import checkpoints
from qat.config import QuantConfig
from qat.errors import ArtifactError, ConfigError, NumericsError
from qat.export.exporter import exporter
from qat.quant import packing
from qat.quant.linear import quantized
from tests import tiny
from tests.export import engines
from tests.export.conftest import IDS

mx = pytest.importorskip("mlx.core", reason="the engine mlx is not installed: pip install -e '.[engines]'")
mlx_lm = pytest.importorskip("mlx_lm", reason="the engine mlx-lm is not installed: pip install -e '.[engines]'")

from qat.export.mlx import writer  # noqa: E402

QUANT = QuantConfig(
    "mixed", engines.grid(3, 32, "shifted"), engines.grid(8, 64, "integers"), embed=engines.grid(6, 64, "shifted")
)


@pytest.fixture(scope="module")
def checkpoint(teacher, cache, tmp_path_factory):
    return engines.checkpoint(tmp_path_factory.mktemp("mlx") / "best", teacher, cache, QUANT)


@pytest.fixture(scope="module")
def student(teacher, checkpoint):
    return checkpoints.load(checkpoint, teacher, tiny.FP32)[0]


def logits(folder):
    model, _ = mlx_lm.utils.load_model(folder)
    return torch.tensor(model(mx.array(IDS.numpy())).astype(mx.float32).tolist())


@pytest.mark.parametrize("levels", ["shifted", "integers"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_decodes_every_weight_to_the_last_bit(bits, group, levels):
    module = engines.layer(bits, group, levels)
    made = {name: mx.array(value.numpy()) for name, value in writer.tensors("it", module, torch.float16).items()}
    assert made["weight"].dtype == mx.uint32 and made["scales"].dtype == made["biases"].dtype == mx.float16
    scales, biases = (made[name].astype(mx.float32) for name in ("scales", "biases"))
    weight = mx.dequantize(made["weight"], scales, biases, group_size=group, bits=bits)
    assert torch.equal(torch.tensor(weight.tolist()), module.weight(torch.float32))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_mlx_lm_computes_the_students_logits(checkpoint, student, export, dtype, most):
    folder = export(checkpoint, "mlx", dtype)
    expected = student(IDS).logits
    assert (logits(folder) - expected).norm() < most * expected.norm()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["model.layers.0.mlp.up_proj"] == {"group_size": 32, "bits": 3}
    assert config["quantization"]["model.layers.1.self_attn.v_proj"] == {"group_size": 64, "bits": 8}
    held = mx.load(str(folder / "model.safetensors"))
    assert held["model.layers.0.mlp.down_proj.weight"].shape == (64, 128 * 3 // 32)
    assert held["model.embed_tokens.weight"].dtype == mx.uint32 and "lm_head.weight" not in held


def test_mlx_lm_answers_word_for_word(checkpoint, student, teacher, export):
    model, tokenizer = mlx_lm.load(str(export(checkpoint, "mlx", "fp32")))
    assert set(tokenizer.eos_token_ids) == set(teacher.ends())
    said = []
    for text in engines.PROMPTS:
        asked = tokenizer.apply_chat_template(engines.chat(text), add_generation_prompt=True)
        written = mlx_lm.stream_generate(model, tokenizer, asked, max_tokens=engines.TOKENS)
        said.append(tokenizer.decode([step.token for step in written], skip_special_tokens=True).strip())
    assert said == engines.ours(student, teacher)


@torch.no_grad()
def test_layers_that_are_dense_stay_so(teacher, cache, export, tmp_path):
    quant = QuantConfig("mlp", engines.grid(4, 64, "shifted"))
    folder = export(engines.checkpoint(tmp_path / "best", teacher, cache, quant), "mlx", "fp32")
    expected = checkpoints.load(tmp_path / "best", teacher, tiny.FP32)[0](IDS).logits
    assert (logits(folder) - expected).norm() < 1e-5 * expected.norm()
    assert len(quantized(checkpoints.load(tmp_path / "best", teacher, tiny.FP32)[0])) == 6


def test_what_mlx_would_decode_otherwise_is_not_published(checkpoint, export, tmp_path, monkeypatch):
    words = packing.words
    monkeypatch.setattr(packing, "words", lambda index, bits: words(index.flip(1), bits))
    with pytest.raises(ArtifactError, match=r"the engine decodes other weights of .* nothing was published"):
        export(checkpoint, "mlx", "fp32", output=tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_shift_that_fp16_would_round_is_refused(student):
    module = engines.layer(8, 32, "integers")
    with torch.no_grad():
        module.scale.fill_(1000.0)
    with pytest.raises(NumericsError, match=r"it\.bias has values that float16 cannot hold: export with"):
        writer.tensors("it", module, torch.float16)


@pytest.mark.parametrize(("kind", "why"), [("xlnet", ""), ("olmo", r" here \(.*ai2-olmo.*\)")])
def test_an_architecture_that_mlx_lm_does_not_know_is_refused(kind, why):
    exporter("mlx").refuse_architecture({"model_type": "llama"})
    with pytest.raises(ConfigError, match=rf"^mlx-lm does not know models of type {kind}{why}: export=hf"):
        exporter("mlx").refuse_architecture({"model_type": kind})


@pytest.mark.parametrize(
    ("described", "seen"),
    [
        ({"model_type": "mistral", "sliding_window": 16, "layer_types": None}, 16),
        ({"model_type": "gemma2", "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, 16),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, None),
        ({"model_type": "qwen3", "sliding_window": 16, "layer_types": ["full_attention"] * 2}, None),
        ({"model_type": "gemma3_text", "sliding_window": 16, "layer_types": ["sliding_attention"]}, None),
    ],
)
def test_a_window_that_mlx_lm_does_not_heed_is_told(described, seen):
    assert writer.ignored_window(described) == seen


def test_what_mlx_lm_cannot_make_is_said_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "quantization": {}}))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"one": mx.zeros(1)})
    with pytest.raises(ArtifactError, match=r"mlx-lm cannot make this model .*n_ctx.*: nothing was published"):
        writer.read(None, tmp_path)
