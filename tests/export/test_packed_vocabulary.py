"""Embedding and head in a packed export: loaded and looked up without ever being dense."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from qat import checkpoints
from qat.config import ExportConfig, ExportType, WeightConfig, WeightFormat
from qat.conversion.convert import install
from qat.export.packed import writer
from qat.export.source import Source
from qat.packed.linear import PackedEmbedding, PackedHead, PackedTiedHead
from qat.quant.embedding import restore
from qat.quant.linear import QuantLinear, quantized
from tests import tiny

IDS = torch.arange(60).reshape(3, 20)
CODEBOOK, GRID = WeightConfig(bits=3, rank=4), WeightConfig(bits=5, format=WeightFormat.grid, group=16)


class Largest(TorchDispatchMode):
    """The most numbers that a floating-point tensor off the meta device had."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, list | tuple) else [made]:
            if isinstance(one, torch.Tensor) and one.is_floating_point() and not one.is_meta:
                self.numbers = max(self.numbers, one.numel())
        return made


@pytest.fixture(scope="module", params=[CODEBOOK, GRID], ids=["codebook", "grid"])
def source(request, teacher):
    model = teacher.load(torch.float32, tiny.CPU)
    quant = replace(tiny.QUANT, embed=request.param)
    made = tiny.converted(model, torch.arange(256).view(8, 32), quant=quant)
    install(model, {name: module for name, (_, module, _) in made.items()})
    return Source(teacher, model, checkpoints.describe(teacher, quant, [layer for layer, _, _ in made.values()]))


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    writer.write(source, folder, ExportConfig("packed", "packed", ExportType.fp32))
    return folder


@torch.no_grad()
def test_no_dense_matrix_is_made_by_loading_it_or_by_looking_rows_up(source, packed):
    with Largest() as seen:
        model = transformers.AutoModelForCausalLM.from_pretrained(packed)
    whole = 512 * 64
    assert 0 < seen.numbers < whole
    assert type(model.get_input_embeddings()) is PackedEmbedding and type(model.lm_head) is PackedTiedHead
    with Largest() as seen:
        rows = model.get_input_embeddings()(IDS)
    assert seen.numbers < whole
    wanted = source.model.get_input_embeddings().weight(torch.float32)[IDS]
    assert (rows - wanted).norm() < 1e-3 * wanted.norm()


@torch.no_grad()
def test_it_says_and_writes_what_the_student_does(source, packed):
    model = writer.read(source, packed)
    wanted = source.model(IDS).logits
    assert (model(IDS).logits - wanted).norm() < 5e-3 * wanted.norm()
    sequence = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1], **sequence), source.model.generate(IDS[:1], **sequence))


@torch.no_grad()
def test_what_is_not_quantized_is_rounded_to_8_bits(teacher, tmp_path):
    model = teacher.load(torch.float32, tiny.CPU)
    exact = model.get_input_embeddings().weight.clone()
    exact[3], exact[4] = 0.0, exact[4] * 1e-3  # padding, and a row whose scale has few digits in fp16
    model.get_input_embeddings().weight.copy_(exact)
    made = tiny.converted(model, torch.arange(256).view(8, 32))
    install(model, {name: module for name, (_, module, _) in made.items()})
    source = Source(teacher, model, checkpoints.describe(teacher, tiny.QUANT, [layer for layer, _, _ in made.values()]))
    writer.write(source, tmp_path, ExportConfig("packed", "packed", ExportType.fp32))
    loaded = writer.read(source, tmp_path)
    assert type(loaded.get_input_embeddings()) is PackedEmbedding and type(loaded.lm_head) is PackedTiedHead
    error = (loaded.get_input_embeddings()(torch.arange(512)).double() - exact.double()).abs().amax(1)
    largest = exact.abs().amax(1).double()
    ordinary = torch.arange(512) != 4
    assert (error <= largest * (0.5 / 127.5 + 2**-11))[ordinary].all()  # half a step, and a scale in fp16
    assert not error[3] and error[4] < 0.1 * largest[4]
    wanted = model(IDS).logits
    assert (loaded(IDS).logits - wanted).norm() < 5e-2 * wanted.norm()


@torch.no_grad()
def test_an_untied_head_is_packed_by_itself(source, tmp_path):
    model = copy.deepcopy(source.model)
    embedding = model.get_input_embeddings()
    head = QuantLinear(embedding.format, 512, 64)
    head.indices.copy_(embedding.indices)
    head.set_parts({name: part.clone() for name, part in embedding.parts().items()})
    model.set_submodule("lm_head", head)
    settings = copy.deepcopy(source.teacher.settings())
    settings.tie_word_embeddings = False
    own = {"settings": lambda _: settings, "path": source.teacher.path, "ends": lambda _: (257,)}
    teacher = type("Folder", (), own)()
    manifest = copy.deepcopy(source.manifest)
    manifest["layers"]["lm_head"] = manifest["layers"]["model.embed_tokens"] | {"kind": "head"}
    untied = type("Untied", (Source,), {"quant": {"bits_per_weight": 1.0}})(teacher, model, manifest)
    writer.write(untied, tmp_path, ExportConfig("packed", "packed", ExportType.fp32, dense=True))
    loaded = writer.read(untied, tmp_path)
    assert type(loaded.lm_head) is PackedHead
    wanted = source.model(IDS).logits
    assert (loaded(IDS).logits - wanted).norm() < 5e-3 * wanted.norm()


@torch.no_grad()
def test_restored_it_is_the_dense_model(source):
    model = copy.deepcopy(source.model)
    wanted = model(IDS).logits
    restore(model)
    assert not {"model.embed_tokens", "lm_head"} & quantized(model).keys()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(model(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(512, 64))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_programs_that_tie_weights_leave_it_as_it_is(source, packed):
    for model in (source.model, writer.read(source, packed)):
        wanted = model(IDS).logits
        model.tie_weights()  # lm-eval does so
        assert torch.equal(model(IDS).logits, wanted)
