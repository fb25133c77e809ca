"""Which layers of a model are quantized, in which role, and which of them see the same input.

Every weight that hidden states are multiplied with has a role, or is kept dense on purpose (what chooses experts),
or told: bits a weight of a part of the model say little while the rest is forgotten.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qat.config import ROLES, SETTINGS, ModeConfig, QuantConfig, WeightConfig, as_plain
from qat.errors import ConfigError
from qat.quant import formats, vocabulary
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
DENSE_BITS = 16  # that a weight that is not quantized counts as
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
    """The layers that `quant` covers, in the model's order.

    Raises:
        ConfigError: the model has none, or weights of a role that `quant` asks for go by names that no role has.
    """
    chosen = _formats(quant)
    found = []
    for name, module in model.named_modules():
        role = role_of(name)
        format = chosen.get(role) if role else None
        if type(module) is nn.Linear and role and format:  # a subclass computes something else
            found.append(Layer(name, role, (module.out_features, module.in_features), format))
    found += _of_vocabulary(model, quant)
    if not found:
        leaves = ", ".join(leaf for leaves in LEAVES.values() for leaf in leaves)
        raise ConfigError(
            f"quant={quant.name} finds no layer to quantize: the model has no linear layer named {leaves}, but"
            f" {told(dense(model, [])) or 'none at all'}"
        )
    _refuse_unmatched(model, found, quant)
    return found


def _of_vocabulary(model: nn.Module, quant: QuantConfig) -> list[Layer]:
    """Embedding and head."""
    found = []
    for name, (role, settings) in vocabulary.chosen(model, quant).items():
        tokens, hidden = model.get_parameter(f"{name}.weight").shape
        found.append(Layer(name, role, (tokens, hidden), format_of(settings)))
    return found


def recorded(quant: QuantConfig) -> dict[str, Any]:
    """What of `quant` shapes a student: `partial` only says what is not refused."""
    chosen = {role: format.settings() if format else None for role, format in _formats(quant).items()}
    return {key: chosen.get(key, value) for key, value in shaping(quant).items() if key != "partial"}


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


def dense(model: nn.Module, layers: list[Layer]) -> dict[str, float]:
    """The decoder's dense weights as shares of all of them, layers that differ in number as one pattern.

    `model` has its weights as they were before quantization; what chooses experts is not told of.
    """
    weights, quantized = decoder_weights(model), {layer.name for layer in layers}
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


def bits_per_weight(layers: list[Layer]) -> float:
    """Mean over all quantized weights."""
    return sum(layer.weights * layer.bits_per_weight for layer in layers) / sum(layer.weights for layer in layers)


def summary(layers: list[Layer], model: nn.Module) -> dict[str, Any]:
    """Counts, effective bits and what is left dense, as `result.json` has them.

    `model` is the teacher, or its names and shapes. Bits are said of the quantized layers and, with 16 for every
    other parameter, of the whole model.
    """
    roles = {role: [layer for layer in layers if layer.role == role] for role in ROLES}
    figures: dict[str, Any] = {
        "bits_per_weight": round(bits_per_weight(layers), 4),
        "model_bits_per_weight": round(_bits_of_model(layers, model), 4),
        "layers": len(layers),
    }
    for role, members in roles.items():
        figures[f"{role}_layers"] = len(members)
        if members:
            figures[f"{role}_bits_per_weight"] = round(bits_per_weight(members), 4)
    return figures | {"dense": {pattern: round(share, 4) for pattern, share in dense(model, layers).items()}}


def told(shares: dict[str, float]) -> str:
    """Patterns with their share of the decoder's weights, the largest first, in one line."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    said = ", ".join(f"{pattern} ({share:.1%})" for pattern, share in ordered[:NAMED])
    return said + (f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else "")


def _formats(quant: QuantConfig) -> dict[str, Format | None]:
    chosen = {role: getattr(quant, role, None) for role in ROLES}
    return {role: format_of(settings) if settings else None for role, settings in chosen.items()}


def format_of(settings: WeightConfig) -> Format:
    """The format that a configuration asks for."""
    chosen = {name: as_plain(getattr(settings, name)) for name in ("format", *SETTINGS[settings.format])}
    return formats.of(chosen)


def _refuse_unmatched(model: nn.Module, layers: list[Layer], quant: QuantConfig) -> None:
    """Refuses a model of which a part that `quant` asks for would stay dense, unless that is asked for too."""
    chosen = _formats(quant)
    asked = {
        pattern: share
        for pattern, share in dense(model, layers).items()
        if any(chosen[role] for role in _places(pattern))
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


def _bits_of_model(layers: list[Layer], model: nn.Module) -> float:
    whole = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(layer.weights for layer in layers)
    return (sum(x.weights * x.bits_per_weight for x in layers) + DENSE_BITS * (whole - quantized)) / whole
