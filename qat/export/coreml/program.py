"""A student as a Core ML program: one token a call, its keys and values kept in two states.

Codebooks stay codebooks (`constexpr_lut_to_dense` with indices of `bits`). Their scales are either factored,
`y = Σ_r (A·g)_r ⊙ (Q (B_r ⊙ x))`, all ranks as the rows of one product, or baked, `W` multiplied out to
dense fp16. Everything is fp16. The root mean square of a norm is taken as the deviation of (x, −x),
whose mean is zero, by the one operation that Core ML computes in more than fp16.
"""

from typing import Any, cast

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Program, types
from coremltools.converters.mil.mil.types.type_mapping import string_to_nptype
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.errors import UnavailableError
from qat.export.source import cast as to_type
from qat.quant.linear import QuantLinear

Array = np.ndarray[Any, Any]
ARCHITECTURES = ("llama", "qwen3")
WIDTHS = (1, 2, 3, 4, 6, 8)  # bits per index that Core ML can pack
INPUTS = ("input_ids", "position", "mask")
STATES = ("keys", "values")


class Decoder:
    """Writes the operations of one model; `program` is the whole.

    Attributes:
        context: tokens that the key-value cache holds.
        factored: keep codebooks and scales apart.
    """

    def __init__(self, model: PreTrainedModel, context: int, factored: bool) -> None:
        """Raises `UnavailableError` for an architecture with other operations."""
        config = model.config
        if config.model_type not in ARCHITECTURES or getattr(config, "hidden_act", None) != "silu":
            known = " and ".join(ARCHITECTURES)
            raise UnavailableError(f"export=coreml writes models of type {known}, this one is {config.model_type}")
        self.model, self.context, self.factored = model, context, factored
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.layers = list(cast(Any, model).model.layers)

    def program(self) -> Program:
        """The program from token id to logits [1, 1, V]."""
        cache = (len(self.layers), self.groups, self.context, self.width)
        specs = [
            mb.TensorSpec((1, 1), types.int32),
            mb.TensorSpec((1,), types.int32),
            mb.TensorSpec((1, 1, 1, self.context), types.fp16),
            mb.StateTensorSpec(cache, types.fp16),
            mb.StateTensorSpec(cache, types.fp16),
        ]

        def main(input_ids: Any, position: Any, mask: Any, keys: Any, values: Any) -> Any:
            return self._logits(input_ids, position, mask, keys, values)

        return cast(Program, mb.program(input_specs=specs, opset_version=ct.target.iOS18)(main))

    def _logits(self, ids: Any, position: Any, mask: Any, keys: Any, values: Any) -> Any:
        inner = cast(Any, self.model).model
        table = mb.const(val=half("embed_tokens", inner.embed_tokens.weight), name="embedding")
        x = mb.gather(x=table, indices=ids, axis=0)
        cos, sin = (mb.gather(x=part, indices=position, axis=2) for part in self._rotations())
        # Read once and handed on: reads of one state are merged, and a second one would miss the update before it.
        cached = [mb.read_state(input=state) for state in (keys, values)]
        for number, layer in enumerate(self.layers):
            attention = layer.self_attn
            normed = norm(x, layer.input_layernorm)
            q, k, v = (self._heads(normed, attention, part) for part in ("q", "k", "v"))
            q, k = (rotated(part, cos, sin) for part in (q, k))
            states = zip((keys, values), cached, (k, v), strict=True)
            cached = [self._remembered(*parts, number, position) for parts in states]
            k, v = (self._of_layer(whole, number) for whole in cached)
            x = mb.add(x=x, y=self._linear(self._attended(q, k, v, mask), attention.o_proj))
            normed = norm(x, layer.post_attention_layernorm)
            gate = mb.silu(x=self._linear(normed, layer.mlp.gate_proj))
            up = self._linear(normed, layer.mlp.up_proj)
            x = mb.add(x=x, y=self._linear(mb.mul(x=gate, y=up), layer.mlp.down_proj))
        head = cast(Any, self.model).lm_head.weight
        tied = head is inner.embed_tokens.weight
        return mb.linear(x=norm(x, inner.norm), weight=table if tied else half("lm_head", head), name="logits")

    def _rotations(self) -> tuple[Array, Array]:
        """Cosines and sines [1, 1, C, D] of every position."""
        positions = torch.arange(self.context)[None]
        cos, sin = cast(Any, self.model).model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        return half("rotary_emb", cos[None]), half("rotary_emb", sin[None])

    def _heads(self, x: Any, attention: Any, part: str) -> Any:
        """q [1, H, 1, D], or k or v [1, G, 1, D]."""
        made = self._linear(x, getattr(attention, f"{part}_proj"))
        made = mb.reshape(x=made, shape=(1, self.heads if part == "q" else self.groups, 1, self.width))
        own = getattr(attention, f"{part}_norm", None)
        return made if own is None else norm(made, own)

    def _remembered(self, state: Any, whole: Any, new: Any, number: int, position: Any) -> Any:
        """The keys or values of all layers [L, G, C, D], those of this layer and token among them."""
        following = mb.add(x=position, y=np.array([1], dtype=np.int32))
        first, last = np.array([number, 0], dtype=np.int32), np.array([number + 1, self.groups], dtype=np.int32)
        begin = mb.concat(values=[first, position, np.array([0], dtype=np.int32)], axis=0)
        end = mb.concat(values=[last, following, np.array([self.width], dtype=np.int32)], axis=0)
        return mb.coreml_update_state(state=state, value=mb.slice_update(x=whole, update=new, begin=begin, end=end))

    def _of_layer(self, whole: Any, number: int) -> Any:
        """The keys or values of one layer [1, G, C, D]."""
        begin, end = (number, 0, 0, 0), (number + 1, self.groups, self.context, self.width)
        return mb.slice_by_index(x=whole, begin=begin, end=end)

    def _attended(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """The attention's output [1, 1, H·D]; heads that share keys are the rows of one product."""
        share = (1, self.groups, self.heads // self.groups, self.width)
        scores = mb.matmul(x=mb.reshape(x=q, shape=share), y=k, transpose_y=True)
        scores = mb.add(x=mb.mul(x=scores, y=np.float16(self.width**-0.5)), y=mask)
        mixed = mb.matmul(x=mb.softmax(x=scores, axis=-1), y=v)
        return mb.reshape(x=mixed, shape=(1, 1, self.heads * self.width))

    def _linear(self, x: Any, module: nn.Module) -> Any:
        """[1, 1, I] to [1, 1, O]."""
        bias = getattr(module, "bias", None)
        if isinstance(module, QuantLinear) and self.factored:
            parts = module.normalized()
            magnified = (parts["scale_A"] * parts["rank_magnitude"]).mT[None]
            scaled = mb.mul(x=x, y=half("scale_B", parts["scale_B"][None]))
            made = mb.linear(x=scaled, weight=codebook_of(module))
            made = mb.reduce_sum(x=mb.mul(x=made, y=half("scale_A", magnified)), axes=(1,), keep_dims=True)
            return made if bias is None else mb.add(x=made, y=half("bias", bias))
        weight = module.weight(torch.float32) if isinstance(module, QuantLinear) else cast(Tensor, module.weight)
        biased: dict[str, Any] = {} if bias is None else {"bias": half("bias", bias)}
        return mb.linear(x=x, weight=half("weight", weight), **biased)


def codebook_of(module: QuantLinear) -> Any:
    """`LUT[indices]` [O, I], packed."""
    width = next(width for width in WIDTHS if width >= module.format.bits)
    codebook = module.parts()["codebook"]
    codebook = torch.cat([codebook, codebook[-1:].expand(2**width - len(codebook))])
    indices = module.indices.cpu().numpy().astype(string_to_nptype(f"uint{width}"))
    return mb.constexpr_lut_to_dense(indices=indices, lut=half("codebook", codebook)[None, None, :, None])


def norm(x: Any, module: Any) -> Any:
    """Root-mean-square norm over the last axis."""
    gamma = half("norm", torch.cat([module.weight, module.weight]))
    both = mb.concat(values=[x, mb.mul(x=x, y=np.float16(-1))], axis=-1)
    made = mb.layer_norm(x=both, axes=(-1,), gamma=gamma, epsilon=np.float16(max(module.variance_epsilon, 6e-8)))
    return mb.split(x=made, num_splits=2, axis=-1)[0]


def rotated(x: Any, cos: Any, sin: Any) -> Any:
    """Rotary embedding of [1, H, 1, D]: the halves of each head are the two coordinates."""
    first, second = mb.split(x=x, num_splits=2, axis=-1)
    turned = mb.concat(values=[mb.mul(x=second, y=np.float16(-1)), first], axis=-1)
    return mb.add(x=mb.mul(x=x, y=cos), y=mb.mul(x=turned, y=sin))


def half(name: str, value: Tensor) -> Array:
    """A tensor as a numpy array of fp16, none of its values lost to infinity."""
    return np.asarray(to_type(name, value, torch.float16).contiguous().cpu().numpy())


def counts(program: Program) -> dict[str, int]:
    """How often each operation occurs, constants left out."""
    made: dict[str, int] = {}
    for operation in program.functions["main"].operations:
        if operation.op_type != "const":
            made[operation.op_type] = made.get(operation.op_type, 0) + 1
    return dict(sorted(made.items()))
