"""The steps of a decoder layer as autograd functions: few, fused, and saving little but their inputs.

Gradients that meet (of the residual stream; of layers with one input) are added where they are made, so
autograd adds nothing itself.
"""

from typing import Any

import torch
from torch import Tensor

from qat.decoder import attention, kernels, long
from qat.decoder.attention import Heads, Places
from qat.quant.linear import QuantLinear
from qat.quant.weights import Weights


class Product(torch.autograd.Function):
    """`x weightᵀ`; the gradient of a weight that learns goes to its sum instead of through autograd."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, sums: Weights | None, layers: list[QuantLinear]) -> Tensor:
        """`layers` are those of which `weight_OI` is made, and `sums` where they learn."""
        ctx.save_for_backward(x_TI, weight_OI)
        ctx.sums, ctx.layers = sums, layers
        return x_TI @ weight_OI.mT

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, None, None, None]:
        """The input's gradient; the weight's is taken aside."""
        x_TI, weight_OI = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.sums.add(ctx.layers, grad_TO, x_TI)
        return grad_TO @ weight_OI if ctx.needs_input_grad[0] else None, None, None, None


class AddNorm(torch.autograd.Function):
    """The residual stream with a layer's outputs added, and its norm."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, more_TD: Tensor | None, weight_D: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """The sum [T, D] and its norm."""
        total, out = kernels.norm(x_TD, more_TD, weight_D, epsilon)
        ctx.save_for_backward(total, weight_D)
        ctx.epsilon = epsilon
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, d_total_TD: Tensor | None, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        """One gradient for both addends."""
        total_TD, weight_D = ctx.saved_tensors
        d_x = kernels.norm_backward(total_TD, weight_D, d_total_TD, d_out_TD, ctx.epsilon)
        return d_x, d_x if ctx.needs_input_grad[1] else None, None, None


class Attend(torch.autograd.Function):
    """Attention from the joint product on, norms of heads and rotations included."""

    @staticmethod
    def forward(ctx: Any, qkv_TF: Tensor, places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads) -> Tensor:
        """Outputs [T, H D]."""
        ctx.save_for_backward(qkv_TF)
        ctx.rest = (places, norms, heads)
        return attention.forward(qkv_TF, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, None, None, None]:
        """The joint product's gradient."""
        (qkv_TF,) = ctx.saved_tensors
        return attention.backward(grad_TF, qkv_TF, *ctx.rest), None, None, None


class AttendLong(torch.autograd.Function):
    """The same over long rows; outputs and sums are kept besides."""

    @staticmethod
    def forward(ctx: Any, qkv_TF: Tensor, places: Places, norms: tuple[Tensor, Tensor] | None, heads: Heads) -> Tensor:
        """Outputs [T, H D]."""
        out_TF, sums = long.forward(qkv_TF, places, norms, heads)
        ctx.save_for_backward(qkv_TF, out_TF, sums)
        ctx.rest = (places, norms, heads)
        return out_TF

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, None, None, None]:
        """The joint product's gradient."""
        return long.backward(grad_TF, *ctx.saved_tensors, *ctx.rest), None, None, None


class Gate(torch.autograd.Function):
    """`silu(gate) · up` of the joint product with both."""

    @staticmethod
    def forward(ctx: Any, both_TF: Tensor) -> Tensor:
        """[T, F] of [T, 2 F]."""
        ctx.save_for_backward(both_TF)
        return kernels.gate(both_TF)

    @staticmethod
    def backward(ctx: Any, grad_TF: Tensor) -> Tensor:
        """[T, 2 F] of [T, F]."""
        (both_TF,) = ctx.saved_tensors
        return kernels.gate_backward(both_TF, grad_TF)
