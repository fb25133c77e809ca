"""The Triton kernel of `qat.quant.stack` that is the same for all formats: corrects gradients of latent weights.

Shapes: N layers, O outputs, I inputs.
"""

# Triton gives kernel arguments a meaning of its own, so they have no type annotations.
# mypy: disable-error-code="no-untyped-def"

from torch import Tensor

from qat.quant.formats.base import ALIGNMENT

try:
    import triton
    import triton.language as tl
except ImportError:  # no CUDA build of torch
    AVAILABLE = False
else:
    AVAILABLE = True

TILE = 64  # outputs and inputs of the tile that a program processes


def shift(
    grads: Tensor,
    weights: Tensor,
    starts: Tensor,
    latent: Tensor,
    outputs_NO: Tensor,
    inputs_NI: Tensor,
    factor: Tensor,
) -> None:
    """Adds `factor · outputs inputsᵀ ⊙ (latent − weight)` to the weights' gradients.

    Args:
        grads: flat fp32, laid out like `weights`.
        weights: flat, in any floating type, the layers one after the other (`qat.quant.weights`).
        starts: [N] int64.
        latent: [N, O, I] fp32.
        outputs_NO, inputs_NI: fp32, the second derivative as a product.
        factor: fp32 scalar.
    """
    layers, outputs, inputs = latent.shape
    grid = (triton.cdiv(inputs, TILE), triton.cdiv(outputs, TILE), layers)
    _shift[grid](grads, weights, starts, latent, outputs_NO, inputs_NI, factor, outputs, inputs, TILE=TILE)


if AVAILABLE:
    BEGIN = tl.constexpr(ALIGNMENT)

    @triton.jit
    def _shift(grads, weights, starts, latent, outputs_h, inputs_h, factor, outputs, inputs, TILE: tl.constexpr):
        layer = tl.program_id(2).to(tl.int64)
        o = tl.program_id(1) * TILE + tl.arange(0, TILE)
        i = tl.program_id(0) * TILE + tl.arange(0, TILE)
        inside = (o[:, None] < outputs) & (i[None, :] < inputs)
        there = tl.multiple_of(tl.load(starts + layer), BEGIN) + o[:, None] * inputs + i[None, :]
        wanted = tl.load(latent + (layer * outputs + o[:, None]) * inputs + i[None, :], mask=inside, other=0.0)
        away = wanted - tl.load(weights + there, mask=inside, other=0.0).to(tl.float32)
        h_o = tl.load(outputs_h + layer * outputs + o, mask=o < outputs, other=0.0) * tl.load(factor)
        h_i = tl.load(inputs_h + layer * inputs + i, mask=i < inputs, other=0.0)
        g = tl.load(grads + there, mask=inside, other=0.0)
        tl.store(grads + there, g + h_o[:, None] * h_i[None, :] * away, mask=inside)
