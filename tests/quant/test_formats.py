"""What every format promises, against formulas written out in float64 and against trying all values."""

from dataclasses import fields

import gguf
import pytest
import torch
from torch import Tensor, nn

from qat import manifests
from qat.config import SETTINGS, WeightConfig, WeightFormat
from qat.quant import formats, latent
from qat.quant.choice import format_of
from qat.quant.formats import Codebook, Format, GroupGrid, KQuant, Vector
from qat.quant.formats.codebook import LowRank
from qat.quant.linear import QuantLinear, kept
from qat.quant.stack import stacks
from qat.quant.weights import Weights

OUTPUTS = 20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
GRIDS = [
    GroupGrid(1, 16),
    GroupGrid(2, 48),
    GroupGrid(4, 8),
    GroupGrid(3, 16, "shifted"),
    GroupGrid(3, 12, "integers"),
    GroupGrid(8, 48, "integers"),
    GroupGrid(4, 24, "iq4nl"),
]
K_QUANTS = [KQuant(bits) for bits in (2, 3, 4, 5, 6)]
VECTORS = [Vector(1, 1, 8), Vector(2, 5, 4), Vector(3, 3, 2), Vector(5, 2, 2)]
FORMATS = [Codebook(1, 1), Codebook(3, 5), *GRIDS, *K_QUANTS, *VECTORS]
every = pytest.mark.parametrize("format", FORMATS, ids=str)


def inputs(format: Format) -> int:
    return 512 if isinstance(format, KQuant) else 48


def entries(format: Format) -> int:
    return 2 ** (format.bits * format.dim)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(format: Format, seed: int = 0) -> QuantLinear:
    module = QuantLinear(format, OUTPUTS, inputs(format))
    module.indices.random_(0, entries(format), generator=torch.Generator().manual_seed(seed))
    parts = {name: drawn(part.shape, seed + n) for n, (name, part) in enumerate(module.parts().items())}
    module.set_parts({name: 1 + 3 * x.abs() if "codes" in name else x for name, x in parts.items()})
    return module.requires_grad_(False)


def exact(format: Format, index: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """W in float64, weight by weight as the format's description has it; grids have scales in fp16."""
    if isinstance(format, LowRank):
        scale = sum(
            parts["rank_magnitude"][r] * torch.outer(parts["scale_A"][:, r], parts["scale_B"][r])
            for r in range(format.rank)
        )
        return parts["codebook"][index.long()].reshape(scale.shape) * scale
    if isinstance(format, KQuant):
        return exact_k_quant(format, index, halved(format, parts))
    group, parts = torch.arange(inputs(format)) // format.group, halved(format, parts)
    scaled = values_of(format).to(index.device)[index.long()] * parts["scale"][:, group]
    return scaled + parts["shift"][:, group] if format.levels == "shifted" else scaled


def exact_k_quant(format: KQuant, index: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """As llama.cpp's types are described: a group is 16 weights, or 32 of Q4_K and Q5_K; signs where nothing shifts."""
    size = 32 if format.bits in (4, 5) else 16
    group, block = torch.arange(512) // size, torch.arange(512) // 256
    value = index.double() - {3: 4, 6: 32}.get(format.bits, 0)
    scaled = value * parts["super_scale"][:, block] * parts["scale_codes"][:, group]
    if format.bits in (3, 6):
        return scaled
    return scaled - parts["super_shift"][:, block] * parts["shift_codes"][:, group]


def values_of(format: GroupGrid) -> Tensor:
    """From the package that has llama.cpp's own decoders, where that knows them."""
    if format.levels == "iq4nl":
        return torch.tensor(gguf.quants.IQ4_NL.kvalues).double()
    lowest = {"halves": (1 - 2**format.bits) / 2, "integers": -(2**format.bits) / 2, "shifted": 0}[format.levels]
    return torch.arange(2**format.bits).double() + lowest


def doubles(module: QuantLinear) -> dict[str, Tensor]:
    return {name: part.detach().double().requires_grad_() for name, part in module.parts().items()}


def halved(format: Format, p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts as they come out of a file in fp16, which of a codebook keeps the norms of B's rows in A."""
    through = lambda x: x + (x.detach().float().half().double() - x.detach())  # noqa: E731
    if isinstance(format, KQuant):
        low, high = {2: (0, 15), 3: (-32, 31), 6: (-128, 127)}.get(format.bits, (0, 63))
        whole = lambda x: x + (x.detach().round().clamp(low, high) - x.detach())  # noqa: E731
        return {name: whole(part) if "codes" in name else through(part) for name, part in p.items()}
    if not isinstance(format, LowRank):
        return {name: through(part) for name, part in p.items()}
    norm = p["scale_B"].norm(dim=1).detach()
    A, B = through(p["scale_A"] * p["rank_magnitude"] * norm), through(p["scale_B"] / norm[:, None])
    return {"codebook": through(p["codebook"]), "scale_A": A, "scale_B": B, "rank_magnitude": torch.ones_like(norm)}


def distances(format: Format, module: QuantLinear, wanted: Tensor, p: dict[str, Tensor]) -> Tensor:
    """How far what shares an index is from each value [O, J, K]."""
    of_index = [exact(format, torch.full_like(module.indices, k), p).detach() for k in range(entries(format))]
    away = torch.stack(of_index, -1) - wanted[..., None].double()
    return away.unflatten(1, (-1, format.dim)).norm(dim=2)


@every
def test_the_weight_is_what_the_format_says(format):
    module = layer_of(format)
    expected = exact(format, module.indices, doubles(module)).detach()
    assert torch.allclose(module.weight(torch.float64), expected, rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("snap", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_stack_are_those_of_autograd(format, snap, device):
    members = [layer_of(format, seed).to(device) for seed in (0, 9)]
    (stack,) = stacks(Weights(members, torch.float32), snap)
    grads = [drawn((OUTPUTS, inputs(format)), 20 + n).to(device) for n in range(2)]
    stack.weights.begin(2)
    stack.write()
    for _ in range(2):  # two micro-batches
        for layer, grad in zip(members, grads, strict=True):
            (layer.dense * grad).sum().backward()
    stack.reduce()
    for layer, grad in zip(members, grads, strict=True):
        p = doubles(layer)
        weight = exact(format, layer.indices, halved(format, p) if snap else p)
        assert torch.allclose(layer.dense.double(), weight, rtol=1e-4, atol=1e-4)
        (2 * weight * grad.double()).sum().backward()
        for name, part in layer.parts().items():
            expected = p[name].grad
            atol = (2e-3 if snap else 1e-5) * expected.abs().max()
            assert torch.allclose(part.grad.double(), expected, rtol=1e-3, atol=atol), name


@every
@pytest.mark.parametrize("device", DEVICES)
def test_a_stack_moves_each_index_to_the_value_nearest_to_its_latent_weight(format, device):
    members = [layer_of(format, seed).to(device) for seed in (0, 9)]
    for n, layer in enumerate(members):
        layer.latent = torch.nn.Parameter(2 * drawn((OUTPUTS, inputs(format)), 30 + n).to(device), requires_grad=False)
        layer.curvature = torch.ones(OUTPUTS, device=device), torch.ones(inputs(format), device=device)
    (stack,) = stacks(Weights(members, torch.float32, latent=True))
    stack.write()
    for layer in members:
        p = {name: part.detach() for name, part in doubles(layer).items()}
        away = distances(format, layer, layer.latent, p)
        found = away.gather(-1, layer.indices[..., None].long())[..., 0]
        assert torch.allclose(found, away.min(-1).values, rtol=1e-4, atol=1e-5)
        assert torch.allclose(layer.dense.double(), exact(format, layer.indices, p), rtol=1e-4, atol=1e-4)


@every
def test_the_nearest_index_is_found_among_all(format):
    module, wanted = layer_of(format), 3 * drawn((OUTPUTS, inputs(format)), 30)
    away = distances(format, module, wanted, doubles(module))
    found = module.grid().nearest(wanted)
    chosen = away.gather(-1, found.long()[..., None])[..., 0]
    assert found.dtype is module.indices.dtype and torch.allclose(chosen, away.min(-1).values, atol=1e-5)


@every
def test_layers_together_are_each_as_alone(format):
    members, grad = [layer_of(format, seed) for seed in (0, 9)], drawn((2, OUTPUTS, inputs(format)), 40)
    parts = {name: torch.stack([m.parts()[name] for m in members]) for name in members[0].parts()}
    index, operands = torch.stack([m.indices for m in members]), format.operands(parts)
    together = format.gradients(grad, index, operands)
    nearest = format.grid(operands).nearest(grad)
    for n, module in enumerate(members):
        assert torch.allclose(format.weight(index, parts)[n], module.weight(torch.float32), atol=1e-5)
        assert torch.equal(nearest[n], module.grid().nearest(grad[n]))
        alone = format.gradients(grad[n], module.indices, format.operands(module.parts()))
        assert all(torch.allclose(together[name][n], alone[name], rtol=1e-4, atol=1e-4) for name in alone)


@every
def test_normalizing_keeps_the_weight_and_owns_its_numbers(format):
    module = layer_of(format)
    before, parts = module.weight(torch.float32), module.normalized()
    for part in module.parts().values():
        part.zero_()
    module.set_parts(parts)
    assert torch.allclose(module.weight(torch.float32), before, rtol=1e-4, atol=1e-5)


@every
def test_parts_are_made_again_of_their_operands(format):
    module = layer_of(format)
    stored = format.stored(format.operands(module.parts()))
    assert stored.keys() == module.parts().keys()
    before = module.weight(torch.float32)
    assert torch.allclose(format.weight(module.indices, stored), before, rtol=1e-4, atol=1e-5)


@every
def test_latent_weights_begin_in_the_cells_of_the_indices(format):
    module = layer_of(format)
    found = latent.between(module, 3 * drawn((OUTPUTS, inputs(format)), 50))
    assert torch.equal(module.grid().nearest(found), module.indices)


@every
def test_rows_are_multiplied_through_the_scaled_operands(format):
    module, rows = layer_of(format), drawn((OUTPUTS,), 60)[:, None]
    operands = format.operands(module.parts())
    scaled = operands | {name: operands[name] * rows for name in format.scaled}
    made = format.grid(scaled).at(module.indices)
    assert torch.allclose(made, module.weight(torch.float32) * rows, rtol=1e-4, atol=1e-4)


@every
def test_bits_are_those_of_what_is_stored(format):
    module = layer_of(format)
    sizes = [part.numel() for name, part in module.parts().items() if name != "rank_magnitude"]
    if isinstance(format, KQuant):  # blocks have the size that the package of llama.cpp's decoders states
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[f"Q{format.bits}_K"]][1]
        assert format.stored_bits(OUTPUTS, 512) == 8 * block * OUTPUTS * 2
    else:
        assert format.stored_bits(OUTPUTS, 48) == format.bits * OUTPUTS * 48 + 16 * sum(sizes)


@every
def test_a_format_is_what_its_settings_say(format):
    assert formats.of(format.settings()) == format
    manifests.FORMATS[format.name](format.settings(), "")
    chosen = {field.name: getattr(format, field.name) for field in fields(format)}
    assert format_of(WeightConfig(format=WeightFormat[format.name], **chosen)) == format


@pytest.mark.parametrize(("shifts", "levels"), [(False, "halves"), (True, "shifted")])
def test_grids_of_files_older_than_levels_are_read(shifts, levels):
    older = {"format": "grid", "bits": 2, "group": 8, "shifts": shifts}
    manifests.FORMATS["grid"](older, "")
    assert formats.of(older) == GroupGrid(2, 8, levels)


def test_the_settings_of_every_format_are_said_alike_everywhere():
    assert {choice.name: set(names) for choice, names in SETTINGS.items()} == {
        name: {field.name for field in fields(kind)} for name, kind in formats.FORMATS.items()
    }
    assert manifests.FORMATS.keys() == formats.FORMATS.keys()


@every
def test_a_layer_is_kept_in_its_own_format_alone(format):
    module = layer_of(format)
    module.bias = nn.Parameter(torch.ones(OUTPUTS))
    same = kept(module, format)
    assert torch.equal(same.weight(torch.float32), module.weight(torch.float32)) and same.bias is module.bias
    assert all(kept(module, other) is None for other in FORMATS if other != format)


@pytest.mark.parametrize(
    ("format", "setting", "why"),
    [
        (Codebook(2, 21), "rank", "has 20 outputs and 48 inputs, so no rank above 20 adds anything"),
        (GroupGrid(2, 32), "group", "has rows of 48 weights, which groups of 32 do not divide: groups of 24 do"),
        (GroupGrid(3, 16, "iq4nl"), "levels", "has indices of 3 bits, and these levels are sixteen: 4 bits"),
        (KQuant(8), "bits", "could have k-quants of 2, 3, 4, 5, 6 bits, as llama.cpp has them"),
        (GroupGrid(2, 96), "group", "has rows of 48 weights, which groups of 96 do not divide: groups of 48 do"),
        (Vector(2, 4, 3), "dim", "could have vectors of 2, 4, 8 weights"),
        (Vector(4, 4, 4), "bits", "could have vectors of 4 weights at 3 bits at most: 4096 entries"),
        (Vector(2, 21, 2), "rank", "has 20 outputs and 48 inputs, so no rank above 20 adds anything"),
    ],
)
def test_a_shape_that_a_format_does_not_suit_is_told(format, setting, why):
    misfit = format.misfit(OUTPUTS, 48)
    assert misfit.setting == setting and misfit.why.startswith(why)
    assert all(suiting.misfit(OUTPUTS, inputs(suiting)) is None for suiting in FORMATS)


def test_of_groups_that_divide_rows_those_of_engines_are_told_first():
    assert "groups of 64 do not divide: groups of 32 do" in GroupGrid(2, 64).misfit(OUTPUTS, 96).why
