"""Chooses each layer's format under a size budget: the formats with the smallest total cost that fit.

What an error in a layer costs is known for each format (`conversion/costs.py`), and costs add up, so this is a knapsack
with one choice a layer (Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", chapter 11). Dynamic programming
over sizes solves it but for the rounding of sizes to one in 65,536 of what is to be shared out; a price on bytes,
which is quicker, leaves over what the largest layer, mostly the embedding, could not use.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qat.config import QuantConfig
from qat.errors import ConfigError
from qat.quant.architectures import Layer
from qat.quant.choice import options
from qat.quant.formats import Format
from qat.quant.size import file_bytes, model_bits_per_weight

Costs = dict[str, dict[Format, float]]  # cost in nats by layer and format, before training

UNITS = 1 << 16
MEGA = 10**6
# Share of a cost that is left after training, by bits of the index: trained KL (docs/log/training.md) over converted KL
# (docs/log/conversion.md) at 2, 3 and 4 bits; other widths have about the value of the nearest of these.
LEFT = {1: 0.31, 2: 0.31, 3: 0.45, 4: 0.48, 5: 0.5, 6: 0.5, 7: 0.5, 8: 0.5}


@dataclass(frozen=True)
class Budget:
    """The largest size that a student may have.

    Attributes:
        said: the setting, `quant.megabytes=56`.
        bits: of all that is counted.
        measure: bits of a student with some layers, counted so.
        shown: such bits in the unit of the setting.
    """

    said: str
    bits: float
    measure: Callable[[list[Layer]], float]
    shown: Callable[[float], float]


def budget(quant: QuantConfig, model: nn.Module) -> Budget:
    """The budget of a configuration for a model; the model's names and shapes are enough."""
    if quant.megabytes is not None:
        unit = 8.0 * MEGA
        return Budget(
            f"quant.megabytes={quant.megabytes:g}",
            quant.megabytes * unit,
            lambda layers: 8 * file_bytes(layers, model),
            lambda bits: bits / unit,
        )
    assert quant.bits is not None  # ensured by qat.cli.checks
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Budget(
        f"quant.bits={quant.bits:g}",
        quant.bits * weights,
        lambda layers: model_bits_per_weight(layers, model) * weights,
        lambda bits: bits / weights,
    )


def formats_of(layer: Layer, quant: QuantConfig) -> list[Format]:
    """The formats that a layer may have, smallest first."""
    return sorted(options(layer.name, layer.role, layer.shape, quant), key=lambda one: one.stored_bits(*layer.shape))


def check(quant: QuantConfig, layers: list[Layer], model: nn.Module) -> None:
    """Refuses a budget that no choice of formats meets.

    Raises:
        ConfigError: the budget is too small; the message has the smallest possible one.
    """
    allowed = budget(quant, model)
    needed = allowed.measure([replace(layer, format=formats_of(layer, quant)[0]) for layer in layers])
    if needed > allowed.bits:
        key, least = allowed.said.partition("=")[0], math.ceil(100 * allowed.shown(needed)) / 100
        raise ConfigError(
            f"{allowed.said} is less than the smallest formats of quant.candidates need, with all else in 16 bits: set"
            f" {key}={least:g} or more"
        )


def chosen(quant: QuantConfig, layers: list[Layer], model: nn.Module, costs: Costs) -> list[Layer]:
    """The layers in the formats with the smallest total cost after training, within the budget.

    Args:
        quant: with a budget that some choice meets.
        layers: all that are quantized.
        model: that they are of, or its names and shapes.
        costs: of the layers that may have several formats.
    """
    allowed = budget(quant, model)
    choices = {layer.name: formats_of(layer, quant) for layer in layers}
    found = [replace(layer, format=choices[layer.name][0]) for layer in layers]
    room = allowed.bits - allowed.measure(found)
    while True:  # repeated, because sizes are rounded down and file headers differ by some bytes
        made = _fill(found, choices, costs, max(0.0, room))
        over = allowed.measure(made) - allowed.bits
        if over <= 0:
            return made
        room -= max(over, room / UNITS)


def _fill(smallest: list[Layer], choices: dict[str, list[Format]], costs: Costs, room: float) -> list[Layer]:
    """The best formats that take at most `room` bits more than the smallest ones."""
    unit = max(1.0, room / UNITS)
    best, picks = torch.zeros(int(room / unit) + 1, dtype=torch.float64), []
    steps = {layer.name: [_steps(layer, one, unit) for one in choices[layer.name]] for layer in smallest}
    for layer in smallest:
        left = [LEFT[one.bits] * costs.get(layer.name, {}).get(one, 0.0) for one in choices[layer.name]]
        tried = [_after(best, step) + cost for step, cost in zip(steps[layer.name], left, strict=True)]
        best, pick = torch.stack(tried).min(0)
        picks.append(pick.to(torch.uint8))
    place, made = len(best) - 1, []
    for layer, pick in zip(reversed(smallest), reversed(picks), strict=True):
        number = int(pick[place])
        place -= steps[layer.name][number]
        made.append(replace(layer, format=choices[layer.name][number]))
    return made[::-1]


def _steps(layer: Layer, format: Format, unit: float) -> int:
    """Units by which a format is larger than the layer's smallest."""
    return int((format.stored_bits(*layer.shape) - layer.format.stored_bits(*layer.shape)) / unit)


def _after(best: Tensor, step: int) -> Tensor:
    """The smallest costs when a layer takes `step` units."""
    step = min(step, len(best))
    return torch.cat([best.new_full((step,), math.inf), best[: len(best) - step]])
