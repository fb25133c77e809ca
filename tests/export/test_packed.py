import json
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qat import checkpoints
from qat.config import ExportConfig, ExportType, ModelConfig, ModelSource, QuantConfig
from qat.errors import ConfigError
from qat.export.anemll_v2 import writer as anemll_v2
from qat.export.hf import writer as hf
from qat.export.packed import writer as packed
from qat.export.source import Source
from qat.models import locate
from qat.packed.linear import PackedLinear
from qat.quant import packing
from qat.quant.architectures import Layer
from qat.quant.formats import Codebook
from qat.quant.linear import quantized
from tests import tiny
from tests.cli.conftest import ROOT
from tests.export.conftest import IDS
from tests.quant import test_experts as experts

LOAD = """
import sys
{imports}
import torch
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
kinds = {{type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}}
assert kinds == {{"PackedLinear"}}, kinds
with torch.no_grad():
    torch.save((str(model.dtype), model(torch.arange(60).reshape(3, 20)).logits), out)
tokenizer = AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}], return_tensors="pt")
assert model.generate(text["input_ids"], max_new_tokens=3, do_sample=False).shape[1] == text["input_ids"].shape[1] + 3
"""
ORDERS = {
    "qat first": "import qat, transformers\n"
    "assert not {'qat.packed', 'qat.packed.integration'} & set(sys.modules)  # nothing heavy before it is wanted\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "transformers first": "from transformers import AutoModelForCausalLM, AutoTokenizer\nimport qat",
    "qat after use": "from transformers import AutoModelForCausalLM, AutoTokenizer, AutoConfig\n"
    "import transformers.quantizers.auto\nimport qat",
}
ALONE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
for kind in (AutoConfig, AutoModelForCausalLM, LlamaForCausalLM):
    try:
        kind.from_pretrained(sys.argv[1])
    except Exception as error:
        print(kind.__name__, "refused:", type(error).__name__, str(error)[:200].replace("\\n", " "))
assert "qat" not in sys.modules
"""


@pytest.fixture(scope="module")
def header():
    def read(folder):
        with open(folder / packed.FILE, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            described = json.loads(file.read(length))
        described.pop("__metadata__")
        return {
            name: entry | {"bytes": entry["data_offsets"][1] - entry["data_offsets"][0]}
            for name, entry in described.items()
        }

    return read


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_import_qat_makes_it_load_in_either_order(best, student, export, elsewhere, tmp_path, imports):
    folder = export(best, "packed", "fp32", dense=True)
    code, said = elsewhere(LOAD.format(imports=imports), folder, tmp_path / "logits.pt", path=str(ROOT))
    assert code == 0, said
    dtype, logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    with torch.no_grad():
        expected = student(IDS).logits
    assert dtype == "torch.float32" and (logits - expected).norm() < 5e-3 * expected.norm()


def test_an_export_of_earlier_versions_loads(best, export, tmp_path):
    folder = export(best, "packed", "fp32")
    older = shutil.copytree(folder, tmp_path / "older")
    tensors = {name.replace(".codebook", ".lut"): value for name, value in load_file(older / packed.FILE).items()}
    assert sum(name.endswith(".lut") for name in tensors) == 14
    save_file(tensors, older / packed.FILE, metadata={"format": "pt"})
    before, now = (AutoModelForCausalLM.from_pretrained(each) for each in (older, folder))
    with torch.no_grad():
        assert torch.equal(before(IDS).logits, now(IDS).logits)


def test_without_the_registration_it_fails(best, export, elsewhere):
    code, said = elsewhere(ALONE, export(best, "packed"))
    assert code == 0 and re.search(r"^AutoConfig refused: ValueError .*qat_packed", said, re.MULTILINE), said
    assert all(f"{kind} refused: " in said for kind in ("AutoModelForCausalLM", "LlamaForCausalLM")), said


def test_importing_qat_alone_loads_nothing_heavy():
    code = "import sys, qat\nassert not {'torch', 'transformers', 'numpy', 'hydra'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_file_weighs_what_the_bits_say(best, student, export, header):
    folder = export(best, "packed", "bf16", dense=True)
    tensors = header(folder)
    layers = quantized(student)
    codebooks = sum(entry["bytes"] for name, entry in tensors.items() if name.rpartition(".")[0] in layers)
    config = json.loads((folder / "config.json").read_text())
    weights = sum(module.indices.numel() for module in layers.values())
    magnitudes = 16 * sum(len(module.rank_magnitude) for module in layers.values())  # too few to be in the figure
    reported = config["quantization_config"]["bits_per_weight"]
    assert (codebooks * 8 - magnitudes) / weights == pytest.approx(reported, abs=1e-4)
    others = sum(entry["bytes"] for entry in tensors.values()) - codebooks
    full = sum(p.numel() for name, p in student.named_parameters() if name.rpartition(".")[0] not in layers)
    assert others == 2 * full  # bf16, and the tied head once
    assert (folder / packed.FILE).stat().st_size < codebooks + others + 200 * len(tensors)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_file_has_as_many_bytes_as_the_record_says(best, export, dtype, dense):
    folder = export(best, "packed", dtype, dense=dense)
    said = json.loads((folder / "manifest.json").read_text())["quant"]
    assert said["file_bytes"] == (folder / packed.FILE).stat().st_size
    assert said["rounded"] == ({} if dense else {"model.embed_tokens": 8 + 16 / 64})
    assert ("rounded to 8 bits" in (folder / "README.md").read_text()) is not dense


@torch.no_grad()
def test_every_weight_is_the_students_to_the_rounding_of_fp16(best, student, export):
    model = packed.read(None, export(best, "packed", "fp32"))
    for name, module in quantized(student).items():
        made, expected = model.get_submodule(name).weight(torch.float64), module.weight(torch.float64)
        assert (made - expected).norm() < 1e-3 * expected.norm()
        index = packing.unpack(model.get_submodule(name).indices, module.format.bits, tuple(module.indices.shape))
        assert torch.equal(index, module.indices)


def test_it_cannot_be_saved_as_what_it_is_not(best, export, tmp_path):
    model = packed.read(None, export(best, "packed"))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def layer(bits, outputs=12, inputs=20, rank=3, bias=True):
    draw = torch.Generator().manual_seed(bits)
    made = PackedLinear(Codebook(bits, rank), outputs, inputs, bias)
    index = torch.randint(2**bits, (outputs, inputs), generator=draw).to(torch.uint8)
    made.indices.copy_(packing.pack(index, bits))
    for part in (made.codebook, made.scale_A, made.scale_B, made.rank_magnitude):
        part.copy_(torch.randn(part.shape, generator=draw))
    if bias:
        made.bias.data = torch.randn(outputs, generator=draw)
    exact = made.codebook.double()[index.long()] * (
        made.scale_A.double() * made.rank_magnitude.double() @ made.scale_B.double()
    )
    return made, exact


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_layer_against_float64(bits):
    made, exact = layer(bits)
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ exact.T + made.bias.double()
    for _ in range(2):  # the second time from the kept weight
        assert torch.allclose(made(x).double(), expected, rtol=1e-5, atol=1e-5)
    made.bias.data = made.bias.data.bfloat16()
    assert torch.allclose(made(x.bfloat16()).double(), expected, rtol=0.1, atol=0.2)


def test_a_kept_weight_does_not_outlive_the_type_or_block_gradients():
    made, exact = layer(2, bias=False)
    x = torch.randn(3, 20)
    with torch.inference_mode():
        made(x)
    x.requires_grad_()
    made(x).sum().backward()
    assert torch.allclose(x.grad.double(), exact.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    made.double()
    assert made.dense is None and made(x.double()).dtype is torch.float64


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_are_packed_each_by_itself_and_read_back(kind, tmp_path):
    """By transformers, which fills what it takes for missing with random numbers."""
    experts.model_of(kind).save_pretrained(tmp_path / "model")
    teacher = locate(ModelConfig("it", ModelSource.folder, path=str(tmp_path / "model")), tmp_path)
    student = teacher.load(torch.float32, tiny.CPU)
    experts.quantize(student, experts.experts_of(student))
    layers = [Layer(name, "mlp", (one.outputs, one.inputs), one.format) for name, one in quantized(student).items()]
    source = Source(teacher, student, checkpoints.describe(teacher, QuantConfig("q2a16"), layers))
    packed.write(source, tmp_path, ExportConfig("packed", "packed", ExportType.fp32, dense=True))
    read, expected = packed.read(source, tmp_path), experts.logits(student)
    assert (experts.logits(read) - expected).norm() < 5e-3 * expected.norm()
    names = [name for name, module in read.named_modules() if isinstance(module, PackedLinear)]
    assert names == [layer.name for layer in layers]
    plain = hf.dense(source, torch.float32)
    assert torch.allclose(experts.logits(plain), expected, atol=1e-4) and not quantized(plain)


def test_a_layout_without_a_place_for_experts_refuses_them_by_name(tmp_path):
    experts.model_of("Mixtral").save_pretrained(tmp_path / "model")
    teacher = locate(ModelConfig("it", ModelSource.folder, path=str(tmp_path / "model")), tmp_path)
    layers = [Layer("model.layers.0.mlp.experts.0.down_proj", "mlp", (16, 12), Codebook(2, 2))]
    manifest = checkpoints.describe(teacher, QuantConfig("q2a16"), layers)
    source = Source(teacher, teacher.skeleton(), manifest)
    with pytest.raises(ConfigError, match=r"export=anemll_v2 .* none for model\.layers\.0\.mlp\.experts\.0\.down_proj"):
        anemll_v2.write(source, tmp_path, ExportConfig("anemll_v2", "anemll_v2", ExportType.fp32))
