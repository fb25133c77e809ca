import pytest
import torch

from qat.quant import latent
from tests.quant.test_linear import layer


def cells(module):
    """Entry, lower and upper border of each weight's cell, times the scale, by looking at every weight alone."""
    codebook = module.codebook.double().tolist()
    scale = ((module.scale_A * module.rank_magnitude) @ module.scale_B).double()
    found = torch.empty(3, *module.indices.shape, dtype=torch.float64)
    for o, i in torch.cartesian_prod(*(torch.arange(n) for n in module.indices.shape)).tolist():
        own = codebook[module.indices[o, i]]
        below, above = [x for x in codebook if x < own], [x for x in codebook if x > own]
        low = (own + max(below)) / 2 if below else own - (min(above) - own) / 2
        high = (own + min(above)) / 2 if above else own + (own - max(below)) / 2
        found[:, o, i] = torch.tensor([own, low, high]) * scale[o, i]
    return found


@pytest.mark.parametrize(("bits", "seed"), [(1, 0), (2, 1), (2, 2), (3, 3), (4, 4)])
def test_latent_weights_lie_between_entry_and_weight_in_the_cell(bits, seed):
    module = layer(bits=bits, seed=seed)
    weight = 2 * torch.randn(module.indices.shape, generator=torch.Generator().manual_seed(seed))
    found = latent.between(module, weight)
    entry, one, other = cells(module)  # where a scale is negative, the lower border is the upper one
    inside = weight.double().clamp(torch.minimum(one, other), torch.maximum(one, other))
    expected = entry + latent.REACH * (inside - entry)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_nearest_entry_is_the_one_that_was_chosen(bits):
    module = layer(outputs=32, inputs=48, bits=bits)
    with torch.no_grad():
        module.scale_A[3] = 0  # a row whose weights are all zero
    found = latent.between(module, torch.randn(32, 48, generator=torch.Generator().manual_seed(1)))
    assert torch.isfinite(found).all()
    kept = torch.arange(32) != 3
    assert torch.equal(module.grid().nearest(found)[kept], module.indices[kept])
