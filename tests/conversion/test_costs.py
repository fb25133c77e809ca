import pytest
import torch

from qat.cache.reader import CacheReader
from qat.config import ConvertConfig, KMeansBackend, KMeansConfig, QuantConfig, WeightConfig
from qat.conversion.convert import Converted, quantize
from qat.conversion.costs import cost, costs
from qat.conversion.moments import gather
from qat.quant import budget
from qat.quant.architectures import select
from qat.quant.places import matrix
from tests import tiny

QUANT = QuantConfig(name="budget", candidates=[WeightConfig(bits=bits, rank=2) for bits in (2, 4)], megabytes=1.0)
SETTINGS, KMEANS = ConvertConfig(name="fast", rounds=1), KMeansConfig("exact", KMeansBackend.exact)


@pytest.fixture(scope="module")
def exact(teacher):
    return teacher.load(torch.float32, tiny.CPU)


@pytest.fixture(scope="module")
def layers(teacher):
    return select(teacher.skeleton(), QUANT)


@pytest.fixture(scope="module")
def text(cache):
    return CacheReader(cache, "train").batch(torch.arange(16)).split(8)


def test_every_layer_has_a_cost_in_every_format_and_more_bits_cost_less(exact, teacher, layers, text):
    choices = [(layer, budget.formats_of(layer, QUANT)) for layer in layers]
    made = costs(
        choices,
        lambda _: teacher.load(torch.float32, tiny.CPU),
        lambda name: matrix(exact, name),
        text,
        SETTINGS,
        KMEANS,
        tiny.CPU,
    )
    assert list(made) == [layer.name for layer in layers] and "embed" in {layer.role for layer in layers}
    for layer, (two, four) in choices:
        assert made[layer.name].keys() == {two, four} and 0 < made[layer.name][four] < made[layer.name][two] / 3


@torch.no_grad()
def test_a_cost_is_half_the_quadratic_form_of_the_error(exact, layers, text):
    """Against the Kronecker product written out, in float64."""
    small = [layer for layer in layers if layer.weights <= 1 << 12 or layer.role == "embed"]
    moments = gather(exact, small, text, gradients=True)
    for made in quantize(small, lambda name: matrix(exact, name), moments, SETTINGS, KMEANS, tiny.CPU):
        name, weight = made.layer.name, matrix(exact, made.layer.name)
        E, H = (made.module.weight(torch.float32) - weight).double(), moments.inputs[made.layer.source].double()
        if made.layer.role == "embed":
            expected = torch.einsum("v,vi,ij,vj->", moments.rows[name].double(), E, H, E) / 2
        else:
            expected = E.flatten() @ torch.kron(moments.outputs[name].double(), H) @ E.flatten() / 2
        assert cost(Converted(made.layer, made.module, {}), weight, moments, tiny.CPU) == pytest.approx(
            float(expected), rel=1e-4
        )
