"""Which layers of a model are quantized, in which role, and which of them see the same input.

What is known of families of models is here, as rules over names: a new one needs its names in these rules, if
they are not there already. A weight of a decoder layer that no rule fits is refused, for bits a weight of a part of
the model say little while the rest is forgotten. Where matrices lie, whatever they are for, is `qat.quant.places`.
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
from qat.quant.experts import stacked
from qat.quant.formats import Format
from qat.quant.places import places
from qat.shaping import shaping

# Parts that always stay dense: they are small, and more depends on them than on other weights.
CHOOSES = r"router\w*|gate|shared_expert_gate|\w*indexer"  # choose experts, or the tokens to attend to
KEPT = (
    CHOOSES,
    # Rates: a few numbers per token
    r"A_log|x_proj|dt_proj|in_proj_(a|b|ba)|[ab]_proj|[if]gate_preact|time_mix_\w+|sink_proj",
    r"altup\w*|\w*hyper_connection\w*|\w*_hc|hc_head|\w*_sconv",  # mix a few streams or neighbouring tokens
    r"encoder_attn|crossattention|cross_attn",  # attend to an encoder, which a causal language model does not have
    r"rel_pos\w*|rel_logits_proj|relative_pos_embeddings|r_proj",  # positions
)
# Roles by the pieces of a name (between dots): the first rule applies whose patterns each match some piece.
RULES = (
    ("mlp", r"mixer", r"(gate|up|gate_up|down)_proj"),  # blocks that mix tokens in some layers and are an MLP in others
    ("attn", r"\w*(attn|attention)s?|cross_attn_layers"),
    ("mlp", r"\w*(mlp|ffn|feed_forward|moe|expert)s?(_block|_in|_out)?|ff"),
    ("attn", r"mixer|mamba\w*|conv|temporal_block|mlstm_layer"),  # blocks that mix tokens in place of attention
    ("mlp", r"fc[12]|intermediate|output|laurel|per_layer_(input_gate|projection)"),
)
# Layers that share their input with another layer, at which it is observed.
SAME_INPUT = {"up_proj": "gate_proj", "k_proj": "q_proj", "v_proj": "q_proj", "w3": "w1"}
INNER = ("down_proj", "w2", "output_linear")  # layers of an expert whose input is computed by the expert itself
NUMBER = re.compile(r"\.\d+(?=\.|$)")
EXACT_BITS = 8  # bits of an embedding from which on the effect of nearest rounding is too small to measure
NAMED = 6  # largest number of patterns named in a message
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
        parent, dot, leaf = self.name.rpartition(".")
        return f"{parent}{dot}{SAME_INPUT.get(leaf, leaf)}"

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
        ConfigError: the model has none, a pattern fits none, or weights that `quant` may mean and that no rule has a
            role for.
    """
    known = _known(model, quant)
    choice.refuse_idle(quant, known, vocabulary.tied(model))
    found = []
    for name, (role, shape) in known.items():
        if allowed := choice.options(name, role, shape, quant):
            widest = max(allowed, key=lambda format: format.stored_bits(*shape))
            found.append(Layer(name, role, shape, widest))
    if not found:
        raise ConfigError(
            f"quant={quant.name} finds no layer to quantize: no rule of {HERE} that it has a format for fits this"
            f" model, which has {told(dense(model, [])) or 'no linear layer at all'}"
        )
    _refuse_unmatched(dense(model, found, known), quant)
    return found


def _known(model: nn.Module, quant: QuantConfig) -> dict[str, tuple[str, tuple[int, int]]]:
    """Role and shape of every layer that can be quantized, by name, in the model's order; embedding and head last."""
    outside = _outside(model)
    known = {
        name: (role, place.shape)
        for name, place in places(model).items()
        if place.module not in outside and (role := role_of(name))
    }
    for name, role in vocabulary.matrices(model, quant).items():
        tokens, hidden = model.get_parameter(f"{name}.weight").shape
        known[name] = role, (tokens, hidden)
    return known


def recorded(quant: QuantConfig) -> dict[str, Any]:
    """The settings of `quant` that determine a student; `partial` is left out, as it only switches off a refusal."""
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
    """The role of a matrix by its name; None for what stays dense, is outside of decoder layers, or fits no rule."""
    if not NUMBER.search(name) or _kept(name):
        return None
    return next((role for role, *patterns in RULES if all(_fits(name, pattern) for pattern in patterns)), None)


def _kept(name: str) -> bool:
    """Whether a weight always stays dense."""
    return any(_fits(name, pattern) for pattern in KEPT)


def _fits(name: str, pattern: str) -> bool:
    return any(re.fullmatch(pattern, piece) for piece in name.split("."))


def _outside(model: nn.Module) -> set[nn.Module]:
    """Modules whose weights no decoder layer multiplies hidden states with: embeddings, convolutions, the head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    apart = (nn.Embedding, nn.modules.conv._ConvNd)
    return {module for module in model.modules() if module is head or isinstance(module, apart)}


def decoder_weights(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of all weights that hidden states are multiplied with; matrices by their names (`qat.quant.places`).

    A weight that is no matrix goes by its name as a parameter.
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


def dense(model: nn.Module, layers: list[Layer], besides: Collection[str] = ()) -> dict[str, float]:
    """The dense weights of the decoder as shares of all its weights; layer numbers are merged into one pattern.

    `model` has its weights as before quantization; routers and the layers in `besides` are left out.
    """
    weights, matrices = decoder_weights(model), places(model)
    quantized = {layer.name for layer in layers} | {*besides}
    whole = sum(shape.numel() for shape in weights.values())
    shares: dict[str, float] = {}
    for name, shape in weights.items():
        # A router has fewer outputs than inputs
        chooses = _fits(name, CHOOSES) and not (name in matrices and shape[0] >= shape[1])
        if name not in quantized and not chooses:
            pattern = NUMBER.sub(".*", name)
            shares[pattern] = shares.get(pattern, 0.0) + shape.numel() / whole
    return shares


def learns(mode: ModeConfig, role: str, format: Format) -> bool:
    """Whether a layer learns; an embedding or head of 8 bits does not, as it has no loss to recover."""
    if role in vocabulary.ROLES:
        return mode.embed and format.bits < EXACT_BITS
    return {"mlp": mode.mlp, "attn": mode.attn}[role]


def told(shares: dict[str, float]) -> str:
    """Patterns with their share of the decoder's weights, the largest first, in one line."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    said = ", ".join(f"{pattern} ({share:.1%})" for pattern, share in ordered[:NAMED])
    return said + (f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else "")


def _refuse_unmatched(shares: dict[str, float], quant: QuantConfig) -> None:
    """Refuses a model where part of what `quant` may mean would stay dense, unless `partial` allows it."""
    missed = {
        pattern: share
        for pattern, share in shares.items()
        if "*" in pattern and not _kept(pattern) and _means(quant, role_of(pattern.replace("*", "0")))
    }
    if missed and not quant.partial:
        raise ConfigError(
            f"quant={quant.name} does not cover {told(missed)} of this model: {sum(missed.values()):.0%} of its"
            f" decoder's weights would stay dense. Add a rule for them to {HERE}, or quantize the rest all the same"
            " with quant.partial=true"
        )


def _means(quant: QuantConfig, role: str | None) -> bool:
    return role is None or choice.asks(role, quant)
