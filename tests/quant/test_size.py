import random
import re

import pytest
import torch
from safetensors.torch import save_file

from qat import tensor_files
from qat.cli import arguments, main
from qat.export.packed import writer as packed
from qat.export.source import Source
from qat.quant.architectures import Layer, select
from qat.quant.formats import Codebook, GroupGrid
from qat.quant.linear import QuantLinear
from qat.quant.size import METADATA, file_bytes, model_bits_per_weight, rounded, stored
from qat.tensor_files import known
from tests.cli.conftest import ROOT
from tests.quant.test_roles import smollm2

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8]
FORMATS = [Codebook(1, 3), Codebook(3, 2), GroupGrid(5, 16), GroupGrid(4, 32, "shifted")]


@pytest.mark.parametrize("seed", range(20))
def test_a_file_has_as_many_bytes_as_reckoned(tmp_path, seed):
    draw, tensors = random.Random(seed), {}
    for number in range(draw.randint(1, 14)):
        name = "".join(draw.choices('ab."\\é😀\n', k=draw.randint(1, 9))) + str(number)
        shape = [draw.randint(0, 90) for _ in range(draw.randint(0, 3))]
        tensors[name] = torch.zeros(shape, dtype=draw.choice(TYPES))
    save_file(tensors, tmp_path / "file", metadata=METADATA)
    described = {name: known(tensor) for name, tensor in tensors.items()}
    assert tensor_files.file_bytes(described, METADATA) == (tmp_path / "file").stat().st_size


def mixed(teacher):
    """A student of several formats, one of them a layer."""
    model, layers = teacher.load(torch.float32, torch.device("cpu")), []
    for number, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj") and number % 3:
            shape = module.out_features, module.in_features
            layers.append(Layer(name, "mlp", shape, FORMATS[number % len(FORMATS)]))
            model.set_submodule(name, QuantLinear(layers[-1].format, *shape, module.bias))
    return model, layers


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes_are_known_before_anything_is_written(teacher, tmp_path, dtype, exact):
    model, layers = mixed(teacher)
    besides = [] if exact else rounded(layers, teacher.skeleton())
    assert [one.name for one in besides] == ["model.embed_tokens"][exact:]  # tied, so once
    tensors = packed.tensors(Source(teacher, model), dtype, besides)
    save_file(tensors, tmp_path / "file", metadata=METADATA)
    described = stored([*layers, *besides], teacher.skeleton(), dtype)
    assert described == {name: known(tensor) for name, tensor in tensors.items()}
    assert file_bytes(layers, teacher.skeleton(), dtype, exact) == (tmp_path / "file").stat().st_size


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
def test_bits_of_the_whole_model_are_those_of_its_file_but_for_the_header(teacher, exact):
    _, layers = mixed(teacher)
    whole = sum(parameter.numel() for parameter in teacher.skeleton().parameters())
    data = file_bytes(layers, teacher.skeleton(), exact=exact) * 8 / whole
    bits = model_bits_per_weight(layers, teacher.skeleton(), exact)
    named = len(stored(layers, teacher.skeleton(), torch.bfloat16))
    assert 0 <= data - bits < 8 * 120 * named / whole


def test_make_run_makes_a_file_of_at_most_66_mb():
    """Of SmolLM2-135M, whose shapes these are."""
    (job,) = re.findall(r"^JOB +:= launch.py (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    quant = main.check(arguments.parse(job.split())).configs[0].quant
    model = smollm2(vocab_size=49_152)
    assert 60e6 < file_bytes(select(model, quant), model) <= 66e6


def test_a_file_written_tensor_by_tensor_is_the_one_that_safetensors_writes(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "b.indices": torch.randint(256, (7,), generator=draw).to(torch.uint8),
        "b.scale": torch.randn(3, 4, generator=draw),
        "a.scale": torch.randn(5, generator=draw),
        "a.half": torch.randn(2, 3, generator=draw).bfloat16(),
        "\u00e4": torch.randn(1, generator=draw).half(),
    }
    save_file(tensors, tmp_path / "whole")
    writer = tensor_files.Writer(tmp_path / "pieces", {name: tensor_files.known(x) for name, x in tensors.items()})
    for name in sorted(tensors, reverse=True):
        writer.put(name, tensors[name])
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert all(torch.equal(writer.get(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match=r"b\.scale"):
        writer.put("b.scale", torch.zeros(4, 3))
