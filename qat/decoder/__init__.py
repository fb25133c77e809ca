"""The decoder layers of Llama and Qwen3 as few products and kernels: the forward pass of training on CUDA.

transformers' own layers are the definition, and run everywhere else. Here query, key and value are one
product, gate and up another; what lies between products is one kernel each (`qat.decoder.kernels`,
`qat.decoder.attention`; a few in long rows, `qat.decoder.long`), forward and backward (`qat.decoder.functions`).

Shapes: B rows, L tokens, T = B · L, D hidden.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat import masks
from qat.attention.kernels import LONGEST, WIDEST, capable
from qat.decoder.attention import Heads, Places
from qat.decoder.functions import AddNorm, Attend, AttendLong, Gate, Product
from qat.norms import norms
from qat.quant.linear import QuantLinear
from qat.quant.weights import Weights

ARCHITECTURES = ("llama", "qwen3")
PROJECTIONS = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)


def decoder(model: nn.Module, checkpointing: bool = False) -> "Decoder | None":
    """The fused form of a causal language model of transformers; None where it has none."""
    device = next(model.parameters()).device
    if not capable(device) or not _known(model):
        return None
    made = Decoder(model, checkpointing)
    types = {product.weight.dtype for layer in made.layers for product in layer.products if product.weight is not None}
    whole = all(product.weight is not None for layer in made.layers for product in layer.products)
    return made if whole and types in ({torch.bfloat16}, {torch.float16}) else None


def _known(model: nn.Module) -> bool:
    """Whether it is one of the architectures, without what only transformers' own layers do."""
    config: Any = model.config
    projections = [m for name, m in model.named_modules() if name.endswith("_proj")]
    return (
        described(config)
        and all(getattr(module, "bias", None) is None for module in projections)
        and not any(module.weight.requires_grad for module in norms(model).values())
        and not (model.training and config.attention_dropout)
    )


def described(config: Any) -> bool:
    """Whether a configuration is of an architecture that has a fused form."""
    return (
        getattr(config, "model_type", None) in ARCHITECTURES
        and config.hidden_act == "silu"
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
        and _width(config) <= WIDEST
    )


def _width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Joint:
    """A product with several linear layers of one input, as one weight."""

    def __init__(self, modules: list[nn.Module]) -> None:
        """`weight` is None where the layers cannot be one: some learn and others do not, or have no weight at hand."""
        self.layers: list[Any] = modules
        homes = {getattr(module, "home", None) for module in modules}
        self.sums: Weights | None = homes.pop() if len(homes) == 1 else None
        self.weight: Tensor | None = None
        if self.sums is not None:
            weight = self.sums.joint(self.layers)
            self.weight = None if weight is None else weight.requires_grad_()
        elif not homes:
            self.weight = self._fixed()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, ΣO]."""
        product: Tensor = Product.apply(x_TI, self.weight, self.sums, self.layers)
        added = self._adapted(x_TI)
        return product if added is None else product + added

    def _adapted(self, x_TI: Tensor) -> Tensor | None:
        """What adapters add [T, ΣO]; None where there are none."""
        if all(getattr(layer, "adapter", None) is None for layer in self.layers):
            return None
        return torch.cat([_adapted(layer, x_TI) for layer in self.layers], -1)

    def _fixed(self) -> Tensor | None:
        """The weights as one piece of memory, into which they are put unless they lie there already.

        Whoever recorded a graph relies on the latter: weights that move leave it with memory that is others' now.
        """
        if any(type(layer) not in (nn.Linear, QuantLinear) for layer in self.layers):
            return None
        weights: list[Any] = [layer.dense if isinstance(layer, QuantLinear) else layer.weight for layer in self.layers]
        if any(weight is None or weight.requires_grad for weight in weights):
            return None
        weights = [weight.detach() for weight in weights]
        whole = _together(weights)
        if whole is not None:
            return whole
        whole = torch.cat(weights)
        for layer, view in zip(self.layers, whole.split([len(weight) for weight in weights]), strict=True):
            if isinstance(layer, QuantLinear):
                layer.dense = view
            else:
                layer.weight.data = view
        return whole


def _adapted(layer: nn.Linear | QuantLinear, x_TI: Tensor) -> Tensor:
    """What the adapter of a layer adds [T, O], perhaps nothing."""
    if isinstance(layer, QuantLinear) and layer.adapter is not None:
        added: Tensor = layer.adapter(x_TI)
        return added
    outputs = layer.outputs if isinstance(layer, QuantLinear) else layer.out_features
    return x_TI.new_zeros(len(x_TI), outputs)


def _together(weights: list[Tensor]) -> Tensor | None:
    """The weights [O, I] as one [ΣO, I], a view; None where they do not follow one another in memory."""
    first, place = weights[0], weights[0].storage_offset()
    for weight in weights:
        beside = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (beside and weight.is_contiguous() and weight.storage_offset() == place):
            return None
        place += weight.numel()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


class Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, heads: Heads) -> None:
        parts = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
        self.products = [Joint([parts[name] for name in names]) for names in PROJECTIONS]
        self.before, self.between, self.heads = layer.input_layernorm, layer.post_attention_layernorm, heads
        self.norms = (parts["q_norm"].weight, parts["k_norm"].weight) if "q_norm" in parts else None

    def __call__(self, stream_TD: Tensor, more_TD: Tensor | None, places: Places) -> tuple[Tensor, Tensor]:
        """The residual stream before the MLP's outputs, and these, which the next norm adds."""
        qkv, out, both, down = self.products
        stream_TD, x = add_norm(stream_TD, more_TD, self.before)
        attend = AttendLong if places.long else Attend
        attended = attend.apply(qkv(x), places, self.norms, self.heads)
        stream_TD, x = add_norm(stream_TD, out(attended), self.between)
        return stream_TD, down(Gate.apply(both(x)))


def add_norm(stream_TD: Tensor, more_TD: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """`stream + more` and its norm."""
    both: tuple[Tensor, Tensor] = AddNorm.apply(stream_TD, more_TD, norm.weight, norm.variance_epsilon)
    return both


def _call(layer: Layer, *inputs: Any) -> Any:
    return layer(*inputs)


class Decoder:
    """All layers of a model, on the weights that its modules had when it was made."""

    def __init__(self, model: Any, checkpointing: bool = False) -> None:
        """With `checkpointing`, only a layer's inputs are kept for the backward pass, and the rest computed again."""
        self.base, config = model.base_model, model.config
        width = _width(config)
        query, shared = config.num_attention_heads, config.num_key_value_heads
        heads = Heads(query, shared, width, width**-0.5, config.rms_norm_eps)
        self.layers = [Layer(layer, heads) for layer in self.base.layers]
        self.checkpointing = checkpointing

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Last hidden states [T, D].

        Args:
            input_ids: [B, L].
            position_ids: [B, L], which restart in each document of a row; None for one document a row.
        """
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if self.checkpointing else _call
        long = input_ids.shape[1] > LONGEST
        seen = masks.spans_of_documents if long else masks.of_documents
        mask = None if position_ids is None else seen(position_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        stream = self.base.embed_tokens(input_ids)
        cos, sin = (turn.contiguous() for turn in self.base.rotary_emb(stream, position_ids))
        places = Places(cos, sin, mask, long)
        stream, more = stream.flatten(0, 1), None
        for layer in self.layers:
            stream, more = run(layer, stream, more, places)
        return add_norm(stream, more, self.base.norm)[1]
