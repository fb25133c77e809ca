"""Exports as transformers reads them with the library compressed-tensors."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat import checkpoints
from qat.config import QuantConfig, WeightConfig
from qat.errors import ArtifactError
from qat.quant import packing
from qat.quant.linear import quantized
from tests import tiny
from tests.export import engines
from tests.export.conftest import IDS

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: pip install -e '.[engines]'")

from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig

from qat.export.compressed import writer

QUANT = QuantConfig(
    "mixed", engines.grid(2, 32, "integers"), engines.grid(8, 64, "integers"), embed=WeightConfig(8, 4)
)


@pytest.fixture(scope="module")
def checkpoint(teacher, cache, tmp_path_factory):
    return engines.checkpoint(tmp_path_factory.mktemp("compressed") / "best", teacher, cache, QUANT)


@pytest.fixture(scope="module")
def student(teacher, checkpoint):
    return checkpoints.load(checkpoint, teacher, tiny.FP32)[0]


@pytest.mark.parametrize("inputs", [64, 48])
@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_of_the_librarys_own_packer(bits, inputs):
    module = engines.layer(bits, 16, "integers", inputs=inputs)
    made = writer.tensors("it", module, torch.float16)
    numbers = (module.indices.short() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(made["weight_packed"], pack_to_int32(numbers, bits))
    exact = numbers.double() * made["weight_scale"].double().repeat_interleave(16, 1)
    assert torch.equal(exact, module.weight(torch.float32).double())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_transformers_computes_the_students_logits(checkpoint, student, export, dtype, most):
    folder = export(checkpoint, "compressed", dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = student(IDS).logits
    assert (model(IDS).logits.float() - expected).norm() < most * expected.norm()


def test_the_configuration_names_every_linear_layer_once(checkpoint, student, export):
    described = json.loads((export(checkpoint, "compressed", "fp16") / "config.json").read_text())
    config = QuantizationConfig(**described["quantization_config"])
    targets = [name for group in config.config_groups.values() for name in group.targets]
    linears = {name for name in quantized(student) if name != "model.embed_tokens"}
    assert sorted(targets) == sorted(linears) and config.ignore == ["lm_head"]
    assert {(group.weights.num_bits, group.weights.group_size) for group in config.config_groups.values()} == {
        (2, 32),
        (8, 64),
    }
    assert all(group.weights.symmetric and group.weights.strategy == "group" for group in config.config_groups.values())


def test_transformers_answers_word_for_word(checkpoint, student, teacher, export):
    folder = export(checkpoint, "compressed", "fp32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    said = []
    for text in engines.PROMPTS:
        asked = tokenizer.apply_chat_template(engines.chat(text), add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**asked, max_new_tokens=engines.TOKENS, do_sample=False)
        said.append(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    assert [text.strip() for text in said] == engines.ours(student, teacher)


def test_what_the_library_would_decode_otherwise_is_not_published(checkpoint, export, tmp_path, monkeypatch):
    words = packing.words
    monkeypatch.setattr(packing, "words", lambda index, bits: words(index.flip(1), bits))
    with pytest.raises(ArtifactError, match=r"the engine decodes other weights of .* nothing was published"):
        export(checkpoint, "compressed", "fp32", output=tmp_path / "there")
    assert not (tmp_path / "there").exists()
