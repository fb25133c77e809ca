"""The `tiny` model with everything around it, small enough for a test: teacher, cache, quantized student."""

import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat import checkpoints, models
from qat.artifacts import Artifact
from qat.cache.batch import Text
from qat.cache.reader import CacheReader
from qat.cache.writer import obtain_cache
from qat.config import (
    CacheConfig,
    ConvertConfig,
    DataConfig,
    DataSource,
    KMeansBackend,
    KMeansConfig,
    ModelConfig,
    ModelSource,
    QuantConfig,
    WeightConfig,
)
from qat.conversion.convert import install, quantize
from qat.conversion.moments import gather
from qat.data.documents import obtain_documents
from qat.machine import Machine
from qat.models import ModelFolder
from qat.quant.architectures import Layer, select
from qat.quant.linear import QuantLinear, quantized
from qat.quant.places import matrix

CPU = torch.device("cpu")
FP32 = Machine(CPU, torch.float32, 4)
QUANT = QuantConfig(name="q2a4", mlp=WeightConfig(bits=2, rank=4), attn=WeightConfig(bits=4, rank=2))


def teacher_in(folder: Path) -> ModelFolder:
    return models.locate(ModelConfig(name="tiny", source=ModelSource.tiny), folder)


def cache_of(teacher: ModelFolder, folder: Path, paragraphs: int = 64) -> Artifact:
    """Some rows of 32 tokens, top-8, in fp32; every document fills two, so no row holds two documents."""
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices("abcdefg", k=5)) for _ in range(11))[:63] for _ in range(paragraphs)]
    (folder / "text.txt").write_text("\n\n".join(texts))
    data = DataConfig(name="text", source=DataSource.text, path=str(folder / "text.txt"), eval_fraction=0.25)
    documents = obtain_documents(data, teacher, 0, FP32, folder)
    settings = CacheConfig(name="L32", length=32, top_k=8, random=4)
    return obtain_cache(settings, documents, "text", teacher, 0, FP32, folder)


def converted(
    model: PreTrainedModel, rows: Tensor, backend: KMeansBackend = KMeansBackend.exact, quant: QuantConfig = QUANT
) -> dict[str, tuple[Layer, QuantLinear, dict[str, float]]]:
    """Every layer of a model with its quantized form and the errors that `convert` reports."""
    layers = select(model, quant)
    moments, settings = gather(model, layers, Text(rows).batches(8)), ConvertConfig(rounds=2, sweeps=0)
    made = quantize(layers, lambda name: matrix(model, name), moments, settings, KMeansConfig("", backend), CPU)
    return {one.layer.name: (one.layer, one.module, one.figures) for one in made}


def checkpoint_in(folder: Path, teacher: ModelFolder, cache: Artifact) -> Path:
    model = teacher.load(torch.float32, CPU)
    made = converted(model, CacheReader(cache, "train").input_ids(16))
    install(model, {name: module for name, (_, module, _) in made.items()})
    description = checkpoints.describe(teacher, QUANT, [layer for layer, _, _ in made.values()])
    checkpoints.save(model, folder, description)
    return folder


def exact_weights(student: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """float64 copies of each layer's codebook and scales, with gradients."""
    names = ("codebook", "scale_A", "scale_B", "rank_magnitude")
    return {
        layer: {name: getattr(module, name).detach().double().requires_grad_() for name in names}
        for layer, module in quantized(student).items()
    }


def exact_logits(
    teacher: ModelFolder, student: PreTrainedModel, parts: dict[str, dict[str, Tensor]], ids: Tensor
) -> Tensor:
    """The student's logits [B, L, V] in float64: the teacher's own linear layers with other weights in them."""
    weights = {}
    for layer, module in quantized(student).items():
        p = parts[layer]
        weights[f"{layer}.weight"] = p["codebook"][module.indices.long()] * (
            p["scale_A"] @ torch.diag(p["rank_magnitude"]) @ p["scale_B"]
        )
    model = teacher.load(torch.float64, CPU)
    return torch.func.functional_call(model, weights, (ids,)).logits
