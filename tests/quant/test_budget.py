import itertools
import random
from dataclasses import replace

import pytest

from qat.config import QuantConfig, WeightConfig, WeightFormat
from qat.errors import ConfigError
from qat.quant import budget
from qat.quant.architectures import select
from qat.quant.size import file_bytes, model_bits_per_weight

CANDIDATES = [WeightConfig(bits=bits, rank=rank) for bits, rank in ((2, 1), (3, 2), (6, 1))]
GRID = WeightConfig(bits=4, format=WeightFormat.grid, group=16)
SOME = {"*.1.*": None, "*.o_proj": None, "*.up_proj": None, "*.q_proj": None}


def problem(teacher, seed=0, **size):
    """Four layers, three formats each, and what every choice costs."""
    quant = QuantConfig(name="budget", candidates=CANDIDATES, layers=SOME, **size)
    layers, draw = select(teacher.skeleton(), quant), random.Random(seed)
    costs = {
        layer.name: {one: draw.random() * 4.0**-one.bits for one in budget.formats_of(layer, quant)} for layer in layers
    }
    return quant, layers, costs


def total(layers, costs):
    return sum(budget.LEFT[layer.format.bits] * costs[layer.name][layer.format] for layer in layers)


def every(quant, layers):
    """All choices there are."""
    for formats in itertools.product(*(budget.formats_of(layer, quant) for layer in layers)):
        yield [replace(layer, format=one) for layer, one in zip(layers, formats, strict=True)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("unit", ["megabytes", "bits"])
def test_nothing_of_that_size_costs_less(teacher, seed, share, unit):
    quant, layers, costs = problem(teacher, seed)
    model = teacher.skeleton()

    def measure(some):
        return file_bytes(some, model) / 1e6 if unit == "megabytes" else model_bits_per_weight(some, model)

    sizes = [(measure(one), total(one, costs)) for one in every(quant, layers)]
    least, most = min(sizes)[0], max(sizes)[0]
    limit = least + share * (most - least)
    found = budget.chosen(replace(quant, **{unit: limit}), layers, model, costs)
    assert measure(found) <= limit
    assert total(found, costs) == min(cost for size, cost in sizes if size <= limit)


def test_a_layer_that_is_named_keeps_its_format(teacher):
    quant, _, costs = problem(teacher, megabytes=1.0)
    pinned = replace(quant, layers=SOME | {"*.0.mlp.gate_proj": GRID})
    found = budget.chosen(pinned, select(teacher.skeleton(), pinned), teacher.skeleton(), costs)
    assert {layer.name.rpartition(".")[2]: layer.format.bits for layer in found}["gate_proj"] == 4
    assert {layer.format.bits for layer in found} == {4, 6}


def test_candidates_that_do_not_suit_a_layer_are_not_its(teacher):
    wide = WeightConfig(bits=2, format=WeightFormat.grid, group=128)
    quant = QuantConfig(name="budget", candidates=[wide, *CANDIDATES], megabytes=1.0)
    shapes = {layer.shape[1]: len(budget.formats_of(layer, quant)) for layer in select(teacher.skeleton(), quant)}
    assert shapes == {64: 3, 128: 4}


@pytest.mark.parametrize("unit", ["megabytes", "bits"])
def test_too_small_a_budget_is_refused_with_the_smallest_that_works(teacher, unit):
    quant, layers, costs = problem(teacher, **{unit: 0.001})
    with pytest.raises(ConfigError) as raised:
        budget.check(quant, layers, teacher.skeleton())
    least = float(str(raised.value).partition(f"set quant.{unit}=")[2].split()[0])
    enough = replace(quant, **{unit: least})
    budget.check(enough, layers, teacher.skeleton())
    with pytest.raises(ConfigError):
        budget.check(replace(quant, **{unit: least - 0.01}), layers, teacher.skeleton())
    budget.chosen(enough, layers, teacher.skeleton(), costs)
