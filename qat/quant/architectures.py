"""Which layers of a model are quantized, in which role, and which of them see the same input.

What is known of families of models is here, as rules over names: a new one needs its names in these rules, if
they are not there already. A weight of a decoder layer that no rule fits is refused, for bits a weight of a part of
the model say little while the rest is forgotten. Where matrices lie, whatever they are for, is `qat.quant.places`.
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
from qat.quant.experts import stacked
from qat.quant.formats import Format
from qat.quant.places import places
from qat.shaping import shaping

# What stays dense in any case: small, and more depends on it than on other weights.
CHOOSES = r"router\w*|gate|shared_expert_gate|\w*indexer"  # experts, or tokens to attend to
KEPT = (
    CHOOSES,
    r"A_log|x_proj|dt_proj|in_proj_(a|b|ba)|[ab]_proj|[if]gate_preact|time_mix_\w+|sink_proj",  # rates, a few a token
    r"altup\w*|\w*hyper_connection\w*|\w*_hc|hc_head|\w*_sconv",  # mixes a few streams or neighbours
    r"encoder_attn|crossattention|cross_attn",  # attends to an encoder, which a causal language model has not
    r"rel_pos\w*|rel_logits_proj|relative_pos_embeddings|r_proj",  # positions
)
# What a matrix is for, by pieces of its name (between dots): the first rule decides whose patterns all fit some piece.
RULES = (
    ("mlp", r"mixer", r"(gate|up|gate_up|down)_proj"),  # a block that mixes tokens in one layer and is an MLP in others
    ("attn", r"\w*(attn|attention)s?|cross_attn_layers"),
    ("mlp", r"\w*(mlp|ffn|feed_forward|moe|expert)s?(_block|_in|_out)?|ff"),
    ("attn", r"mixer|mamba\w*|conv|temporal_block|mlstm_layer"),  # mixes tokens in attention's place
    ("mlp", r"fc[12]|intermediate|output|laurel|per_layer_(input_gate|projection)"),
)
# Layers whose input is another one's beside them, at which it is observed.
SAME_INPUT = {"up_proj": "gate_proj", "k_proj": "q_proj", "v_proj": "q_proj", "w3": "w1"}
INNER = ("down_proj", "w2", "output_linear")  # of an expert: what it reads was made by the expert itself
NUMBER = re.compile(r"\.\d+(?=\.|$)")
EXACT_BITS = 8  # from which on rounding an embedding to the nearest cannot be measured
DENSE_BITS = 16  # that a weight that is not quantized counts as
NAMED = 6  # patterns in a message
HERE = "qat/quant/architectures.py"


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
        ConfigError: the model has none, or weights that `quant` may mean and that no rule has a role for.
    """
    chosen, outside = _formats(quant), _outside(model)
    found = [
        Layer(name, role, place.shape, format)
        for name, place in places(model).items()
        if place.module not in outside and (role := role_of(name)) and (format := chosen[role])
    ]
    found += _of_vocabulary(model, quant)
    if not found:
        raise ConfigError(
            f"quant={quant.name} finds no layer to quantize: no rule of {HERE} that it has a format for fits this"
            f" model, which has {told(dense(model, [])) or 'no linear layer at all'}"
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
    """The role of a matrix by its name; None for what stays dense, is outside of decoder layers, or fits no rule."""
    if not NUMBER.search(name) or _kept(name):
        return None
    return next((role for role, *patterns in RULES if all(_fits(name, pattern) for pattern in patterns)), None)


def _kept(name: str) -> bool:
    """Whether a weight stays dense on purpose."""
    return any(_fits(name, pattern) for pattern in KEPT)


def _fits(name: str, pattern: str) -> bool:
    return any(re.fullmatch(pattern, piece) for piece in name.split("."))


def _outside(model: nn.Module) -> set[nn.Module]:
    """Modules whose weights no decoder layer multiplies hidden states with: embeddings, convolutions, the head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    apart = (nn.Embedding, nn.modules.conv._ConvNd)
    return {module for module in model.modules() if module is head or isinstance(module, apart)}


def decoder_weights(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of all weights that hidden states are multiplied with, matrices by their names (`qat.quant.places`).

    A weight that is none goes by its own name, as a parameter.
    """
    found: dict[str, torch.Size] = {}
    outside = _outside(model)
    for owner, module in model.named_modules():
        for leaf, parameter in module._parameters.items() if module not in outside else ():
            if parameter is None or parameter.dim() < 2 or leaf.endswith("bias"):
                continue
            if leaf in stacked(module):
                found |= {f"{owner}.{number}.{leaf}": matrix.shape for number, matrix in enumerate(parameter)}
            else:
                found[owner if leaf == "weight" else f"{owner}.{leaf}"] = parameter.shape
    return found


def dense(model: nn.Module, layers: list[Layer]) -> dict[str, float]:
    """The decoder's dense weights as shares of all of them, layers that differ in number as one pattern.

    `model` has its weights as they were before quantization; what chooses experts is not told of.
    """
    weights, matrices, quantized = decoder_weights(model), places(model), {layer.name for layer in layers}
    whole = sum(shape.numel() for shape in weights.values())
    shares: dict[str, float] = {}
    for name, shape in weights.items():
        chooses = _fits(name, CHOOSES) and not (name in matrices and shape[0] >= shape[1])  # few of many
        if name not in quantized and not chooses:
            pattern = NUMBER.sub(".*", name)
            shares[pattern] = shares.get(pattern, 0.0) + shape.numel() / whole
    return shares


def learns(mode: ModeConfig, role: str, format: Format) -> bool:
    """Whether a layer learns; an embedding or head of 8 bits costs nothing that training could win back."""
    if role in vocabulary.ROLES:
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


def _formats(quant: QuantConfig) -> dict[str | None, Format | None]:
    chosen = {role: getattr(quant, role, None) for role in ROLES}
    return {role: format_of(settings) if settings else None for role, settings in chosen.items()}


def format_of(settings: WeightConfig) -> Format:
    """The format that a configuration asks for."""
    chosen = {name: as_plain(getattr(settings, name)) for name in ("format", *SETTINGS[settings.format])}
    return formats.of(chosen)


def _refuse_unmatched(model: nn.Module, layers: list[Layer], quant: QuantConfig) -> None:
    """Refuses a model of which a part that `quant` may mean would stay dense, unless that is asked for too."""
    chosen = _formats(quant)
    missed = {
        pattern: share
        for pattern, share in dense(model, layers).items()
        if "*" in pattern and not _kept(pattern) and chosen.get(role_of(pattern.replace("*", "0")), True)
    }
    if missed and not quant.partial:
        raise ConfigError(
            f"quant={quant.name} does not cover {told(missed)} of this model: {sum(missed.values()):.0%} of its"
            f" decoder's weights would stay dense. Add a rule for them to {HERE}, or quantize the rest all the same"
            " with quant.partial=true"
        )


def _bits_of_model(layers: list[Layer], model: nn.Module) -> float:
    whole = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(layer.weights for layer in layers)
    return (sum(x.weights * x.bits_per_weight for x in layers) + DENSE_BITS * (whole - quantized)) / whole
