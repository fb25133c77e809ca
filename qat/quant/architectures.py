"""Which layers of a model are quantized, in which role, and which of them see the same input.

Every weight that hidden states are multiplied with has a role, or is kept dense on purpose (what chooses experts),
or told: bits a weight of a part of the model say little while the rest is forgotten.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qat.config import ROLES, ModeConfig, QuantConfig, WeightConfig
from qat.errors import ConfigError
from qat.quant import choice, vocabulary
from qat.quant.formats import Format
from qat.shaping import shaping

LEAVES = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
# What a place in a model is called where its weights have names of their own.
PLACES = {"attn": re.compile(r"attn|attention|mixer"), "mlp": re.compile(r"mlp|ffn|feed_forward|moe|expert")}
ROUTER = re.compile(r"\.(router|gate|shared_expert_gate)(\.|$)")  # chooses experts: an output for each of them
NUMBER = re.compile(r"\.\d+(?=\.|$)")
EXACT_BITS = 8  # from which on rounding an embedding to the nearest cannot be measured
NAMED = 6  # patterns in a message

SAME_INPUT = {"up_proj": "gate_proj", "k_proj": "q_proj", "v_proj": "q_proj"}


@dataclass(frozen=True)
class Layer:
    """A linear layer to quantize, with a role of `ROLES`. `source` names the layer whose input it shares."""

    name: str
    role: str
    shape: tuple[int, int]
    format: Format

    @property
    def source(self) -> str:
        """The layer at which this layer's input is observed."""
        parent, _, leaf = self.name.rpartition(".")
        return f"{parent}.{SAME_INPUT.get(leaf, leaf)}"

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Index bits plus what the format's parts add, all counted as 16-bit numbers."""
        return self.format.stored_bits(*self.shape) / self.weights


def select(model: nn.Module, quant: QuantConfig) -> list[Layer]:
    """The layers that `quant` covers, in the model's order; those that a budget chooses for in its widest format.

    Raises:
        ConfigError: the model has none, a pattern fits none, or weights of a role that `quant` asks for go by names
            that no role has.
    """
    known = _known(model, quant)
    choice.refuse_idle(quant, known)
    found = []
    for name, (role, shape) in known.items():
        if allowed := choice.options(name, role, shape, quant):
            widest = max(allowed, key=lambda format: format.stored_bits(*shape))
            found.append(Layer(name, role, shape, widest))
    if not found:
        leaves = ", ".join(leaf for leaves in LEAVES.values() for leaf in leaves)
        raise ConfigError(
            f"quant={quant.name} finds no layer to quantize: the model has no linear layer named {leaves}, but"
            f" {told(dense(model, [])) or 'none at all'}"
        )
    _refuse_unmatched(dense(model, found, known), quant)
    return found


def _known(model: nn.Module, quant: QuantConfig) -> dict[str, tuple[str, tuple[int, int]]]:
    """Role and shape of every layer that can be quantized, by name, in the model's order; embedding and head last."""
    known = {}
    for name, module in model.named_modules():
        role = role_of(name)
        if type(module) is nn.Linear and role:  # a subclass computes something else
            known[name] = role, (module.out_features, module.in_features)
    for name, role in vocabulary.matrices(model, quant).items():
        tokens, hidden = model.get_parameter(f"{name}.weight").shape
        known[name] = role, (tokens, hidden)
    return known


def recorded(quant: QuantConfig) -> dict[str, Any]:
    """What of `quant` shapes a student: `partial` only says what is not refused."""
    chosen = {role: _settings(choice.of_role(role, quant)) for role in ROLES}
    said = {key: value for key, value in shaping(quant).items() if value or key in ROLES}
    if quant.layers:
        said["layers"] = {pattern: _settings(settings) for pattern, settings in quant.layers.items()}
    if quant.candidates:
        said["candidates"] = [_settings(settings) for settings in quant.candidates]
    return {key: value for key, value in (said | chosen).items() if key in said and key != "partial"}


def _settings(settings: WeightConfig | None) -> dict[str, Any] | None:
    return choice.format_of(settings).settings() if settings else None


def role_of(name: str) -> str | None:
    """`mlp` or `attn` by the last part of a layer's name; None for any other."""
    leaf = name.rpartition(".")[2]
    return next((role for role, leaves in LEAVES.items() if leaf in leaves), None)


def decoder_weights(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of all weights that hidden states are multiplied with: not of embeddings, head and convolutions.

    A weight goes by its layer's name, one that is no layer's `weight` (a stack of experts) by its own.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    owners = dict(model.named_modules())
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = owners[owner]
        outside = module is head or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)
        if parameter.dim() > 1 and not outside and not leaf.endswith("bias"):
            found[owner if leaf == "weight" else name] = parameter.shape
    return found


def dense(model: nn.Module, layers: list[Layer], besides: Collection[str] = ()) -> dict[str, float]:
    """The decoder's dense weights as shares of all of them, layers that differ in number as one pattern.

    `model` has its weights as they were before quantization; what chooses experts is not told of, nor `besides`.
    """
    weights, quantized = decoder_weights(model), {layer.name for layer in layers} | {*besides}
    whole = sum(shape.numel() for shape in weights.values())
    shares: dict[str, float] = {}
    for name, shape in weights.items():
        if name not in quantized and not _routes(name, shape):
            pattern = NUMBER.sub(".*", name)
            shares[pattern] = shares.get(pattern, 0.0) + shape.numel() / whole
    return shares


def learns(mode: ModeConfig, role: str, format: Format) -> bool:
    """Whether a layer learns; an embedding or head of 8 bits costs nothing that training could win back."""
    if role in ("embed", "head"):
        return mode.embed and format.bits < EXACT_BITS
    return {"mlp": mode.mlp, "attn": mode.attn}[role]


def told(shares: dict[str, float]) -> str:
    """Patterns with their share of the decoder's weights, the largest first, in one line."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    said = ", ".join(f"{pattern} ({share:.1%})" for pattern, share in ordered[:NAMED])
    return said + (f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else "")


def _refuse_unmatched(shares: dict[str, float], quant: QuantConfig) -> None:
    """Refuses a model of which a part that `quant` asks for would stay dense, unless that is asked for too."""
    asked = {
        pattern: share
        for pattern, share in shares.items()
        if any(choice.asks(role, quant) for role in _places(pattern))
    }
    if asked and not quant.partial:
        raise ConfigError(
            f"quant={quant.name} does not cover {told(asked)} of this model: {sum(asked.values()):.0%} of its"
            " decoder's weights would stay dense; quant.partial=true quantizes the rest all the same"
        )


def _places(pattern: str) -> list[str]:
    """The role of a weight by where it is; both where its place does not tell."""
    if role := role_of(pattern):
        return [role]
    return [role for role, place in PLACES.items() if place.search(pattern.lower())] or list(PLACES)


def _routes(name: str, shape: torch.Size) -> bool:
    """Whether a weight chooses experts, of which there are fewer than hidden dimensions."""
    return ROUTER.search(name) is not None and len(shape) == 2 and shape[0] < shape[1]
