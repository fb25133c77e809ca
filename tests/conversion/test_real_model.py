"""What only shows on real weights and real text; skipped where the default model's package is not installed."""

import pytest
import torch

from qat.cache.batch import Text
from qat.config import DataConfig, DataSource, Packing, QuantConfig, WeightConfig
from qat.conversion.convert import STACK_BYTES, stacks
from qat.conversion.moments import gather
from qat.data import packing, texts, thinking
from qat.data.documents import Document
from qat.quant import assign, kmeans, lookup
from qat.quant.architectures import select
from qat.quant.curvature import Curvature, Factor
from qat.quant.fit import importance
from qat.quant.formats.codebook_fit import alternate, start
from qat.quant.places import matrix
from tests import smollm2, tiny

QUANT = QuantConfig(name="q2a4", mlp=WeightConfig(bits=2, rank=4), attn=WeightConfig(bits=4, rank=2))
EVERY, LAST = 12, 12  # of 30 blocks; benchmarks/assignment.py does all


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Model and calibration rows [N, 128] from the project's own prompts."""
    teacher = smollm2.folder(tmp_path_factory)
    tokenizer, model = teacher.tokenizer(), teacher.load(torch.float32, tiny.CPU)
    model.config.use_cache = False
    model.model.layers = model.model.layers[: LAST + 1]
    questions = texts.prompts(DataConfig(name="prompts", source=DataSource.selfgen))
    documents = [Document(q, thinking.chat_tokens(tokenizer, [{"role": "user", "content": q}])) for q in questions]
    return model.eval().requires_grad_(False), packing.pack(documents, 128, Packing.joined, 0).input_ids[:8].long()


def test_compensated_indices_beat_nearest_ones_in_output_error_on_every_layer(calibrated):
    model, rows = calibrated
    layers = [layer for layer in select(model, QUANT) if int(layer.name.split(".")[2]) % EVERY == 0]
    assert len(layers) == 2 * 7
    moments = gather(model, layers, Text(rows).batches(4))
    for stack in stacks(layers, STACK_BYTES["cpu"]):
        weight = torch.stack([matrix(model, layer.name) for layer in stack])
        H = torch.stack([moments.inputs[layer.source] for layer in stack])
        codebooks = start(weight, importance(H), 2 ** stack[0].format.bits, stack[0].format.rank, kmeans.kmeans)
        codebooks = alternate(codebooks, weight, importance(H))
        S, codebook = codebooks.scale(), codebooks.codebook_NK
        before, after = (
            Curvature(H).cost(weight - lookup.look_up(codebook, index) * S)
            for index in (assign.nearest(weight, S, codebook), assign.compensated(weight, S, codebook, Factor.of(H)))
        )
        for layer, nearest, compensated in zip(stack, before, after, strict=True):
            assert compensated < nearest, layer.name
