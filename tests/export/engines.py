"""Students on grids of engines, and what ours answer."""

from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf
from torch import Tensor

from qat import checkpoints
from qat.cache.reader import CacheReader
from qat.config import CONF, Levels, QuantConfig, WeightConfig, WeightFormat
from qat.conversion.convert import install
from qat.evaluate.answers import answers
from qat.models import ModelFolder
from qat.quant.architectures import Layer
from qat.quant.embedding import empty
from qat.quant.formats import GroupGrid
from qat.quant.formats.grid import LEVELS
from qat.quant.linear import Quantized, QuantLinear
from tests import tiny

PROMPTS = ("What is the capital of France?", "Write a short poem about the sea.", "What is 12 plus 30?")
TOKENS = 12


def grid(bits: int, group: int, levels: str) -> WeightConfig:
    return WeightConfig(bits, format=WeightFormat.grid, group=group, levels=Levels[levels])


def preset(name: str) -> QuantConfig:
    """An option of `conf/quant/`."""
    composed = OmegaConf.merge(OmegaConf.structured(QuantConfig), OmegaConf.load(CONF / "quant" / f"{name}.yaml"))
    return cast(QuantConfig, OmegaConf.to_object(composed))


def rounded(layer: Layer, weight_OI: Tensor) -> Quantized:
    """A layer on a grid of even steps by the range of each group, without any fit."""
    format = cast(GroupGrid, layer.format)
    values, groups = LEVELS[format.levels](format.bits).float(), weight_OI.unflatten(1, (-1, format.group))
    shift = groups.amin(2).half().float() if format.shifts else torch.zeros(groups.shape[:2])
    apart = groups - shift[..., None]
    scale = (apart.abs().amax(2) / values.abs().max()).half().float().clamp_min(2**-24)
    module = empty(layer)
    nearest = (apart / scale[..., None] - values[0]).round_().clamp_(0, len(values) - 1)
    module.indices.copy_(nearest.view_as(weight_OI))
    module.set_parts({"scale": scale, "shift": shift} if format.shifts else {"scale": scale})
    return module.requires_grad_(False)


def checkpoint(folder: Path, teacher: ModelFolder, cache, quant: QuantConfig) -> Path:
    """A student of the tiny teacher in these formats."""
    model = teacher.load(torch.float32, tiny.CPU)
    made = tiny.converted(model, CacheReader(cache, "train").input_ids(16), quant=quant)
    install(model, {name: module for name, (_, module, _) in made.items()})
    layers = [layer for layer, _, _ in made.values()]
    checkpoints.save(model, folder, checkpoints.describe(teacher, quant, layers))
    return folder


def layer(bits: int, group: int, levels: str, outputs: int = 6, inputs: int = 384) -> QuantLinear:
    """Any numbers of fp16 in one layer."""
    draw = torch.Generator().manual_seed(bits)
    made = QuantLinear(GroupGrid(bits, group, levels), outputs, inputs)
    made.indices.copy_(torch.randint(2**bits, (outputs, inputs), generator=draw))
    numbers = {name: torch.randn(part.shape, generator=draw) for name, part in made.parts().items()}
    made.set_parts({name: value.half().float() for name, value in numbers.items()})
    return made


def ours(model, teacher: ModelFolder) -> list[str]:
    """What a student answers to the prompts."""
    tokenizer = teacher.tokenizer()
    asked = [tokenizer.apply_chat_template(chat(text), add_generation_prompt=True)["input_ids"] for text in PROMPTS]
    return answers(model, tokenizer, asked, teacher.ends(), TOKENS, tiny.FP32)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
