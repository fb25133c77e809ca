"""Attention as models of this package compute it: kernels for 16-bit numbers on CUDA, PyTorch's own elsewhere.

Rows of 64 or 128 tokens have a kernel of their own (`kernels`), as kernels made for long ones are slow on them: on an
H200 the backward pass of cuDNN takes five times as long as reading and writing its tensors would. Longer rows go
block by block (`flash`): what PyTorch has for rows that documents share reads and writes a mask of L² numbers for
each layer and computes what it hides.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qat import masks
from qat.attention import flash, kernels, plain

NAME = "qat"  # value of transformers' `attn_implementation` that selects this attention
# Arguments of attention that the kernels do not support; sliding windows are part of the mask.
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
        attention_mask: boolean [B, 1, L, L], true where a token is seen, or spans int32 [B, 2, L, 1] (`qat.masks`);
            None for causal attention.
        scaling: of the scores; by default one over the root of D.
        others: what transformers passes on besides.
    """
    scale = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    spans = attention_mask is not None and attention_mask.dtype == torch.int32
    if fits(module, query_BHLD, key_BKLD, value_BKLD, others):
        if query_BHLD.shape[2] <= kernels.LONGEST and _own(attention_mask, query_BHLD):
            return short(query_BHLD, key_BKLD, value_BKLD, attention_mask, scale), None
        if _capable(query_BHLD.device) and scale > 0 and (spans or attention_mask is None):
            return long(query_BHLD, key_BKLD, value_BKLD, attention_mask, scale)[0], None
    if attention_mask is not None and spans:
        attention_mask = masks.of_spans(attention_mask)
    return sdpa_attention_forward(module, query_BHLD, key_BKLD, value_BKLD, attention_mask, scaling=scaling, **others)


def fits(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, others: dict[str, Any]) -> bool:
    """Whether the kernels support these inputs: 16-bit numbers on CUDA, whole rows, no token seeing those behind it."""
    length, width = q.shape[2:]
    causal = others.get("is_causal")
    return (
        kernels.AVAILABLE
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and width <= kernels.WIDEST
        and k.shape[2:] == v.shape[2:] == (length, width)
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and all(_absent(others.get(name)) for name in UNKNOWN)
    )


@torch.compiler.assume_constant_result
def _capable(device: torch.device) -> bool:
    """Of a device, as a constant of what is compiled for it."""
    return kernels.capable(device)


def _own(mask: Tensor | None, q: Tensor) -> bool:
    """Whether rows have masks of their own, or none."""
    rows, _, length, _ = q.shape
    return mask is None or (mask.dtype == torch.bool and mask.shape == (rows, 1, length, length))


def mask(*arguments: Any, **named: Any) -> Tensor | None:
    """transformers' boolean mask, in its interface; where `long` computes attention over whole rows, spans of it."""
    made = sdpa_mask(*arguments, **named)
    if made is None or not masks.whole() or not _goes_by_spans(made, named.get("dtype")):
        return made
    return masks.spans_of(made)


def _goes_by_spans(mask: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether `long` is for rows of this mask."""
    queries, keys = mask.shape[-2:]
    short_type = dtype in (torch.bfloat16, torch.float16)
    return short_type and queries == keys > kernels.LONGEST and kernels.capable(mask.device)


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


@torch.library.custom_op("qat::long_attention", mutates_args=())
def long(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, spans_B2L1: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`softmax(q kᵀ · scale) v` [B, L, H, D] over rows of any length, causal or under spans, and sums of each softmax.

    For what `fits` and `kernels.capable` say. A token that does not see itself gets NaN.
    """
    q, k, v = _adjacent(q_BHLD, k_BKLD, v_BKLD)
    return flash.forward(q, k, v, spans_B2L1, scale)


@torch.library.custom_op("qat::long_attention_backward", mutates_args=())
def long_backward(
    grad_BLHD: Tensor,
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    spans_B2L1: Tensor | None,
    out_BLHD: Tensor,
    sums_BHL: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `long` for q, k and v, from its outputs and sums."""
    grad, q, k, v = _adjacent(grad_BLHD, q_BHLD, k_BKLD, v_BKLD)
    into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    flash.backward(grad, q, k, v, out_BLHD, sums_BHL, spans_B2L1, scale, into)
    return into


@long.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    rows, heads, length, width = q.shape
    return q.new_empty(rows, length, heads, width), q.new_empty(rows, heads, length, dtype=torch.float32)


@long_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor | None,
    out: Tensor,
    sums: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _adjacent(q, k, v)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_long(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate_long(ctx: Any, grad_BLHD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (*long_backward(grad_BLHD, *ctx.saved_tensors, ctx.scale), None, None)


long.register_autograd(_differentiate_long, setup_context=_keep_long)


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
AttentionMaskInterface.register(NAME, mask)
