"""Files of other quantizers read back, each against another reader of the same format."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qat import checkpoints
from qat.config import ExportConfig, ExportType
from qat.errors import ConfigError
from qat.export.gguf import FILE, writer
from qat.export.source import Source
from qat.quant.linear import quantized
from qat.quant.places import places
from tests import tiny
from tests.export import engines

llama = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama.cpp's quantizer is not installed: pip install llama-cpp-python"
)
ROWS = torch.randint(256, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def importance(teacher):
    from peers import llamacpp

    return llamacpp.importance(teacher, ROWS)


@pytest.fixture(scope="module")
def dense(teacher, tmp_path_factory) -> Path:
    from peers import llamacpp

    file = tmp_path_factory.mktemp("gguf") / "dense.gguf"
    llamacpp.write(teacher, file)
    return file


@llama
@torch.no_grad()
def test_importance_is_the_mean_square_of_what_enters_a_layer(teacher, importance):
    model = teacher.load(torch.float64, tiny.CPU)
    first = model.model.layers[0]
    entering = first.input_layernorm(model.model.embed_tokens(ROWS))
    expected = entering.square().mean((0, 1)).numpy()
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(importance[f"blk.0.{name}.weight"], expected, rtol=1e-5)
    assert len(importance) == len(places(model.model))
    assert {name.partition(".")[0] for name in importance} == {"blk"}


@llama
@pytest.mark.parametrize(("name", "embedding", "stored"), [("Q4_K_M", None, "Q8_0"), ("IQ4_XS", "Q5_1", "Q5_1")])
def test_a_gguf_file_is_read_back_to_the_last_bit(name, embedding, stored, teacher, dense, importance, tmp_path):
    import gguf
    from peers import llamacpp

    file = tmp_path / "model.gguf"
    llamacpp.quantize(dense, file, name, embedding, importance)
    found = llamacpp.read(teacher, file)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for ours, theirs in [("model.embed_tokens", "token_embd"), ("model.layers.1.mlp.down_proj", "blk.1.ffn_down")]:
        tensor = tensors[f"{theirs}.weight"]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found.model.get_parameter(f"{ours}.weight").detach().numpy(), expected)
        assert found.parameter_bytes[f"{ours}.weight"] == tensor.data.nbytes
    assert tensors["token_embd.weight"].tensor_type.name == stored
    assert sum(found.parameter_bytes.values()) == sum(tensor.n_bytes for tensor in tensors.values())
    assert found.file_bytes == file.stat().st_size > sum(found.parameter_bytes.values())
    exact = teacher.load(torch.float32, tiny.CPU)
    for parameter, value in found.model.named_parameters():  # queries and keys have their rows back in order
        assert (value - exact.get_parameter(parameter)).norm() <= 0.1 * exact.get_parameter(parameter).norm()


@llama
@torch.no_grad()
@pytest.mark.parametrize("preset", ["gguf_q2_0", "gguf_q4_1"])
def test_llama_cpp_decodes_a_students_file_to_the_last_bit(preset, teacher, cache, tmp_path):
    from peers import llamacpp

    best = engines.checkpoint(tmp_path / "best", teacher, cache, engines.preset(preset))
    student = checkpoints.load(best, teacher, tiny.FP32)[0]
    writer.write(Source(teacher, student), tmp_path, ExportConfig("gguf", "gguf", ExportType.fp32))
    found = llamacpp.read(teacher, tmp_path / FILE).model
    layers = quantized(student)
    assert "model.embed_tokens" in layers
    for name, layer in layers.items():
        assert torch.equal(found.get_parameter(f"{name}.weight"), layer.weight(torch.float32)), name


@llama
def test_what_matters_is_rounded_with_more_care(teacher, dense, importance, tmp_path):
    from peers import llamacpp

    name, errors = "model.layers.0.mlp.up_proj.weight", []
    weight = teacher.load(torch.float32, tiny.CPU).get_parameter(name)
    for weighing in (1.0, 1e4):
        weights = {key: np.ones_like(value) for key, value in importance.items()}
        for value in weights.values():
            value[::4] = weighing
        llamacpp.quantize(dense, tmp_path / "model.gguf", "IQ4_NL", None, weights)
        found = llamacpp.read(teacher, tmp_path / "model.gguf").model.get_parameter(name)
        errors.append(float((found - weight)[:, ::4].norm()))
    assert errors[1] < 0.9 * errors[0]


@llama
def test_a_type_that_llama_cpp_does_not_have_is_refused(dense, importance, tmp_path):
    from peers import llamacpp

    with pytest.raises(ConfigError, match=r"llama.cpp has no type Q4_K_X \(did you mean Q4_K_[SM]\?\); it knows"):
        llamacpp.quantize(dense, tmp_path / "no.gguf", "Q4_K_X", None, importance)
    assert not (tmp_path / "no.gguf").exists()


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4])
def test_an_mlx_folder_is_read_back(bits, teacher, tmp_path):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install -e '.[engines]'")
    from peers import mlx

    mlx.quantize(teacher, tmp_path / "made", bits, 32)
    found = mlx.read(teacher, tmp_path / "made")
    held = load_file(tmp_path / "made" / "model.safetensors")
    for name in ("model.embed_tokens", "model.layers.0.mlp.down_proj"):
        words, scales, biases = (held[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        index = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & 2**bits - 1
        groups = index.reshape(*scales.shape, 32) * scales[..., None].astype(np.float32) + biases[..., None]
        weight = found.model.get_parameter(f"{name}.weight").numpy()
        np.testing.assert_allclose(weight, groups.reshape(weight.shape), rtol=1e-6, atol=1e-7)
        assert found.bits([f"{name}.weight"]) == bits + 32 / 32
    exact = teacher.load(torch.float32, tiny.CPU).get_parameter("model.layers.0.mlp.down_proj.weight")
    assert (weight - exact.numpy()).std() < 0.8 * exact.std()
    assert found.file_bytes == sum(file.stat().st_size for file in (tmp_path / "made").glob("*.safetensors"))
