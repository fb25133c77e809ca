"""Attention as models of this package compute it: a kernel for short rows on CUDA, PyTorch's own elsewhere.

Distillation works on rows of 64 or 128 tokens, for which kernels made for long ones are slow: on an H200
the backward pass of cuDNN takes five times as long as reading and writing its tensors would.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qat.attention import kernels, plain

NAME = "qat"  # value of transformers' `attn_implementation` that selects this attention
# Arguments of attention that the kernel does not support; sliding windows are part of the mask.
UNKNOWN = ("dropout", "softcap", "position_bias", "s_aux", "cache", "output_attentions")


def attend(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The outputs [B, L, H, D] of an attention layer, in transformers' interface.

    Args:
        module: the layer.
        query_BHLD: queries.
        key_BKLD: keys, for K heads that H query heads share.
        value_BKLD: values.
        attention_mask: boolean [B, 1, L, L], true where a token is seen; None for causal attention.
        scaling: of the scores; by default one over the root of D.
        others: what transformers passes on besides.
    """
    if not fits(module, query_BHLD, key_BKLD, value_BKLD, attention_mask, others):
        return sdpa_attention_forward(
            module, query_BHLD, key_BKLD, value_BKLD, attention_mask, scaling=scaling, **others
        )
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    return short(query_BHLD, key_BKLD, value_BKLD, attention_mask, scale), None


def fits(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, others: dict[str, Any]) -> bool:
    """Whether the kernel supports these inputs: 16-bit numbers on CUDA, whole short rows, causal or with own masks."""
    rows, _, length, width = q.shape
    causal = others.get("is_causal")
    return (
        kernels.AVAILABLE
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and length <= kernels.LONGEST
        and width <= kernels.WIDEST
        and k.shape[2:] == v.shape[2:] == (length, width)
        and (mask is None or (mask.dtype == torch.bool and mask.shape == (rows, 1, length, length)))
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and all(_absent(others.get(name)) for name in UNKNOWN)
    )


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float)) and not value)


@torch.library.custom_op("qat::short_attention", mutates_args=())
def short(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1LL: Tensor | None, scale: float) -> Tensor:
    """`softmax(q kᵀ · scale) v` [B, L, H, D] over short rows, causal or under a boolean mask.

    Every token must see itself. Rows and dimensions as in `fits`.
    """
    if not kernels.capable(q_BHLD.device):
        return plain.forward(q_BHLD, k_BKLD, v_BKLD, mask_B1LL, scale)
    q, k, v = _adjacent(q_BHLD, k_BKLD, v_BKLD)
    return kernels.forward(q, k, v, mask_B1LL, scale)


@torch.library.custom_op("qat::short_attention_backward", mutates_args=())
def short_backward(
    grad_BLHD: Tensor, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, mask_B1LL: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `short` for q, k and v."""
    if not kernels.goes_back(q_BHLD):
        return plain.backward(grad_BLHD, q_BHLD, k_BKLD, v_BKLD, mask_B1LL, scale)
    grad, q, k, v = _adjacent(grad_BLHD, q_BHLD, k_BKLD, v_BKLD)
    return kernels.backward(grad, q, k, v, mask_B1LL, scale)


@short.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    rows, heads, length, width = q.shape
    return q.new_empty(rows, length, heads, width)


@short_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _adjacent(q, k, v)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_BLHD: Tensor) -> tuple[Tensor | None, ...]:
    return (*short_backward(grad_BLHD, *ctx.saved_tensors, ctx.scale), None, None)


short.register_autograd(_differentiate, setup_context=_keep)


def _adjacent(*tensors: Tensor) -> list[Tensor]:
    """The same tensors, each with its last dimension in one piece, as the kernels read them."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
