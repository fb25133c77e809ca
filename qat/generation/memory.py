"""Keys and values of the text so far, held by the attention layers themselves.

transformers passes a cache from layer to layer and finds a layer's part by its number, for which each
layer would be compiled anew. Here every attention layer holds its own part, in tensors that stay in
place, and two further attention implementations of transformers' interface write there: one as whole
prompts are read (`FILL`), one as single tokens follow (`DECODE`). A row's tokens lie from position 0 on,
whatever the length of the others: nothing is padded on the left, and causal attention is all the masking
that prompts get. transformers makes no mask for an implementation that registers none. Models that need more
(windows, sinks, states of other kinds) are not written with like this: `qat.generation.settle` finds out.

Shapes: R rows, H query heads, K key-value heads, T positions, D dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from qat import attention
from qat.forward import attending, decoder_layers
from qat.generation import kernels

FILL, DECODE = "qat_fill", "qat_decode"


def elements(config: PreTrainedConfig) -> int:
    """Numbers that all layers together hold of one token."""
    heads, width = shape(config)
    return 2 * number(config, "num_hidden_layers") * heads * width


def number(config: PreTrainedConfig, name: str) -> int:
    """A number of a configuration that holds for all layers; 0 where it has none, or one for each layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers raises it if the value differs among layers
        return 0
    return value if isinstance(value, int) else 0


def shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Key-value heads and dimensions of a head."""
    heads = number(config, "num_attention_heads") or 1
    width = number(config, "head_dim") or number(config, "hidden_size") // heads
    return number(config, "num_key_value_heads") or heads, width


class Memory:
    """Keys and values [R, K, T, D] of every layer, and the position [R] at which each row's next token goes."""

    def __init__(self, model: PreTrainedModel, rows: int, positions: int) -> None:
        """Reserves `positions` in each of `rows`, for a model of which every layer attends, as `self_attn`."""
        self.model = model
        self.modules: list[nn.Module] = [layer.get_submodule("self_attn") for layer in decoder_layers(model)]
        heads, width = shape(model.config.get_text_config())
        # Separate tensors: torch.compile would copy one of two that share memory before writing to it.
        self.layers = [
            [torch.zeros(rows, heads, positions, width, dtype=model.dtype, device=model.device) for _ in range(2)]
            for _ in self.modules
        ]
        self.position = torch.zeros(rows, dtype=torch.long, device=model.device)

    @contextmanager
    def filling(self, rows_E: Tensor) -> Iterator[None]:
        """Inside, forward passes over whole prompts fill the rows with these numbers."""
        with self._attention(FILL, rows_E):
            yield

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside, forward passes are over one token of every row, which is remembered at its `position`."""
        with self._attention(DECODE, self.position):
            yield

    @contextmanager
    def _attention(self, name: str, where: Tensor) -> Iterator[None]:
        for module, (keys, values) in zip(self.modules, self.layers, strict=True):
            vars(module)["memory"] = (keys, values, where)
        try:
            with attending(self.model, name):
                yield
        finally:
            for module in self.modules:
                del vars(module)["memory"]


def _fill(
    module: Any, q_RHLD: Tensor, k_RKLD: Tensor, v_RKLD: Tensor, mask: None, **others: Any
) -> tuple[Tensor, None]:
    """Causal attention over prompts from position 0 on, whose keys and values are kept."""
    keys, values, rows = module.memory
    keys[rows, :, : k_RKLD.shape[2]] = k_RKLD
    values[rows, :, : v_RKLD.shape[2]] = v_RKLD
    return attention.attend(module, q_RHLD, k_RKLD, v_RKLD, None, **others)


def _decode(
    module: Any,
    q_RH1D: Tensor,
    k_RK1D: Tensor,
    v_RK1D: Tensor,
    mask: None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One token of every row, over what was kept and itself."""
    scale = q_RH1D.shape[-1] ** -0.5 if scaling is None else scaling
    return next_token(q_RH1D, k_RK1D, v_RK1D, *module.memory, scale), None


@torch.library.custom_op("qat::next_token", mutates_args=("keys_RKTD", "values_RKTD"))
def next_token(
    q_RH1D: Tensor,
    k_RK1D: Tensor,
    v_RK1D: Tensor,
    keys_RKTD: Tensor,
    values_RKTD: Tensor,
    position_R: Tensor,
    scale: float,
) -> Tensor:
    """Outputs [R, 1, H, D] of attention for one token a row, which is added at its row's position.

    Key-value heads are never repeated for the query heads that share them.
    """
    if kernels.AVAILABLE and q_RH1D.is_cuda:
        return kernels.next_token(q_RH1D, k_RK1D, v_RK1D, keys_RKTD, values_RKTD, position_R, scale)
    rows = torch.arange(len(position_R), device=position_R.device)
    keys_RKTD[rows, :, position_R] = k_RK1D.squeeze(2)
    values_RKTD[rows, :, position_R] = v_RK1D.squeeze(2)
    length = int(position_R.max()) + 1
    seen_RT = torch.arange(length, device=position_R.device) <= position_R[:, None]
    grouped = q_RH1D.view(len(rows), keys_RKTD.shape[1], -1, q_RH1D.shape[-1])
    keys, values = keys_RKTD[:, :, :length], values_RKTD[:, :, :length]
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=seen_RT[:, None, None], scale=scale)
    return out.reshape(len(rows), 1, *q_RH1D.shape[1::2])


@next_token.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])


AttentionInterface.register(FILL, _fill)
AttentionInterface.register(DECODE, _decode)
