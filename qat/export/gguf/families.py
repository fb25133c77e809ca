"""Architectures that llama.cpp knows, and what a GGUF file says of each. Nothing here imports torch.

A file has numbers where llama.cpp asks for them; what it has in code instead (`src/models/` there) a model must agree
with, or it is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qat.errors import ConfigError
from qat.suggest import did_you_mean

Fields = dict[str, Any]
Demands = dict[str, tuple[Any, Any]]  # by name, what a model has and what it must have
OTHERWISE = "export=hf is dense, and llama.cpp's own converter takes it on"


def _nothing(described: Fields) -> Fields:
    return {}


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes models of a type of transformers.

    Attributes:
        name: what it calls them.
        interleaved: it turns neighbouring outputs of queries and keys as pairs, where transformers pairs those half
            a head apart, so rows lie in another order.
        norms_from_one: transformers adds one to the weights of norms, and a file has the sums.
        activation: the one that it has in code.
        rotations: kinds of rotary scaling that it heeds.
        biases: projections may have them.
        tied: whether the head must be the embedding (True), must not be (False), or may be (None).
        more: further fields.
        demands: what it has in code.
    """

    name: str
    interleaved: bool = False
    norms_from_one: bool = False
    activation: str = "silu"
    rotations: tuple[str, ...] = ("default", "linear", "yarn")
    biases: bool = False
    tied: bool | None = None
    more: Callable[[Fields], Fields] = _nothing
    demands: Callable[[Fields], Demands] = _nothing


def _windows(described: Fields) -> Fields:
    return {"attention.sliding_window": int(described["sliding_window"])}


def _gemma2(described: Fields) -> Fields:
    return _windows(described) | {
        "attn_logit_softcapping": float(described["attn_logit_softcapping"] or 0),
        "final_logit_softcapping": float(described["final_logit_softcapping"] or 0),
    }


def _gemma2_demands(described: Fields) -> Demands:
    capped = {name: bool(described[name]) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    return {name: (given, True) for name, given in capped.items()} | _gemma_demands(described, 46, 2)


def _gemma3_demands(described: Fields) -> Demands:
    local = described["rope_parameters"]["sliding_attention"]
    return {
        "final_logit_softcapping": (described.get("final_logit_softcapping"), None),
        "use_bidirectional_attention": (bool(described.get("use_bidirectional_attention")), False),
        "rope_parameters.sliding_attention": (
            (local.get("rope_type"), float(local["rope_theta"])),
            ("default", 10_000.0),
        ),
    } | _gemma_demands(described, 62, 6)


def _gemma_demands(described: Fields, wide: int, period: int) -> Demands:
    """Scores are divided by the root of a head's size, or that of a head's share of the width in models of so many
    layers; one layer in `period` sees all."""
    layers = described["num_hidden_layers"]
    kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    share = described["hidden_size"] // described["num_attention_heads"]
    return {
        "query_pre_attn_scalar": (
            described["query_pre_attn_scalar"],
            share if layers == wide else head_size(described),
        ),
        "layer_types": (described["layer_types"], kinds),
    }


def _granite(described: Fields) -> Fields:
    return {
        "attention.scale": float(described["attention_multiplier"]),
        "embedding_scale": float(described["embedding_multiplier"]),
        "residual_scale": float(described["residual_multiplier"]),
        "logit_scale": float(described["logits_scaling"]),
    }


def _qwen3_moe(described: Fields) -> Fields:
    return {
        "expert_count": int(described.get("num_experts") or described["num_local_experts"]),
        "expert_used_count": int(described["num_experts_per_tok"]),
        "expert_feed_forward_length": int(described["moe_intermediate_size"]),
    }


def _qwen3_moe_demands(described: Fields) -> Demands:
    """Experts in every layer, whose shares of a token add up to one."""
    return {
        "norm_topk_prob": (bool(described["norm_topk_prob"]), True),
        "decoder_sparse_step": (described["decoder_sparse_step"], 1),
        "mlp_only_layers": (described.get("mlp_only_layers") or [], []),
    }


def _whole_heads(described: Fields) -> Demands:
    share = described["hidden_size"] // described["num_attention_heads"]
    return {"head_dim": (head_size(described), share)}


def _smollm3_demands(described: Fields) -> Demands:
    layers = described["num_hidden_layers"]
    return {
        "no_rope_layers": (described["no_rope_layers"], [int((i + 1) % 4 != 0) for i in range(layers)]),
        "use_sliding_window": (bool(described.get("use_sliding_window")), False),
    }


def _phi3(described: Fields) -> Fields:
    settings = described["rope_parameters"]
    known = settings.get("original_max_position_embeddings") or described["original_max_position_embeddings"]
    said: Fields = {"rope.scaling.original_context_length": int(known), "attention.sliding_window": 0}
    if settings.get("rope_type") == "longrope":
        said["rope.scaling.attn_factor"] = _long_attention(described, known)
    return said


def _long_attention(described: Fields, known: int) -> float:
    """What "longrope" of transformers multiplies cosines and sines with."""
    settings = described["rope_parameters"]
    factor = settings.get("factor") or described["max_position_embeddings"] / known
    longer = math.sqrt(1 + math.log(factor) / math.log(known)) if factor > 1 else 1.0
    return float(settings.get("attention_factor") or longer)


LLAMA = Family("llama", interleaved=True, rotations=("default", "linear", "yarn", "llama3"), biases=True)
GEMMA = Family("gemma", norms_from_one=True, activation="gelu_pytorch_tanh", rotations=("default",), tied=True)
FAMILIES = {  # by `model_type`
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": Family("smollm3", interleaved=True, demands=_smollm3_demands),
    "granite": Family("granite", interleaved=True, more=_granite, demands=_whole_heads),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe", more=_qwen3_moe, demands=_qwen3_moe_demands),
    "olmo2": Family("olmo2", tied=False, demands=_whole_heads),
    "phi3": Family("phi3", rotations=("default", "longrope"), more=_phi3, demands=_whole_heads),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, name="gemma2", more=_gemma2, demands=_gemma2_demands),
    "gemma3_text": replace(
        GEMMA, name="gemma3", rotations=("default", "linear"), more=_windows, demands=_gemma3_demands
    ),
}
WITH_WINDOWS = ("gemma2", "gemma3_text")


def refuse_architecture(described: Fields) -> None:
    """Looks whether llama.cpp computes what a `config.json` describes.

    Args:
        described: all of it, as transformers has it in memory.

    Raises:
        ConfigError: it has no code for it, or this export does not know how to tell it.
    """
    kind = str(described.get("model_type"))
    if kind not in FAMILIES:
        raise ConfigError(
            f"export=gguf does not write models of type {kind}{did_you_mean(kind, FAMILIES)}; it knows"
            f" {', '.join(FAMILIES)}: {OTHERWISE}"
        )
    family = FAMILIES[kind]
    activation = described.get("hidden_activation") or described.get("hidden_act", "silu")
    demands: Demands = {"hidden_act": (activation, family.activation)}
    if not family.biases:
        demands |= {name: (bool(described.get(name)), False) for name in ("attention_bias", "mlp_bias")}
    if family.tied is not None:
        demands["tie_word_embeddings"] = (bool(described.get("tie_word_embeddings")), family.tied)
    rope(described)
    for name, (given, wanted) in (demands | family.demands(described)).items():
        if given != wanted:
            raise ConfigError(
                f"llama.cpp computes models of type {kind} with {name}={_short(wanted)}, and this one has"
                f" {_short(given)}: export=hf takes it as it is"
            )


def fields(described: Fields) -> Fields:
    """The numbers of a model by their names in a GGUF file, without the architecture before them."""
    family = FAMILIES[described["model_type"]]
    heads = described["num_attention_heads"]
    size = head_size(described)
    return {
        "context_length": min(described["max_position_embeddings"], window(described) or math.inf),
        "embedding_length": described["hidden_size"],
        "block_count": described["num_hidden_layers"],
        "feed_forward_length": described["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": described.get("num_key_value_heads") or heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(described["rms_norm_eps"]),
        "rope.dimension_count": int(size * _rotations(described).get("partial_rotary_factor", 1.0)),
        "vocab_size": described["vocab_size"],
        **rope(described),
        **family.more(described),
    }


def window(described: Fields) -> int | None:
    """Tokens that attention sees at most where llama.cpp would see all: up to so many both are the same."""
    kind = described["model_type"]
    if kind in WITH_WINDOWS or not described.get("use_sliding_window", True):
        return None
    return described.get("sliding_window")


def head_size(described: Fields) -> int:
    """The number of outputs of an attention head."""
    return int(described.get("head_dim") or described["hidden_size"] // described["num_attention_heads"])


def rope(described: Fields) -> Fields:
    """The fields about rotary embeddings.

    Raises:
        ConfigError: they are stretched in a way that llama.cpp does not heed, or this export cannot tell.
    """
    settings = _rotations(described)
    kind, said = settings.get("rope_type", "default"), {"rope.freq_base": float(settings.get("rope_theta", 10_000.0))}
    family = FAMILIES[str(described["model_type"])]
    if kind in family.rotations:
        if kind in ("default", "llama3", "longrope"):  # the latter two are stored as tensors
            return said
        if kind == "linear":
            return said | {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
        if _is_plain_yarn(settings):
            return said | {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(settings["factor"]),
                "rope.scaling.original_context_length": int(settings["original_max_position_embeddings"]),
            }
    raise ConfigError(
        f"export=gguf does not know how to tell llama.cpp of rotations of type {kind} with {', '.join(settings)} in"
        f" models of type {described['model_type']}: export=hf takes them as they are"
    )


def _is_plain_yarn(settings: Fields) -> bool:
    """Whether llama.cpp's own numbers are meant: 32 turns and one, and a temperature by the factor."""
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    return (
        set(settings) <= known
        and settings.get("beta_fast") in (None, 32)
        and settings.get("beta_slow") in (None, 1)
        and "original_max_position_embeddings" in settings
    )


def _rotations(described: Fields) -> Fields:
    """Settings of rotary embeddings; those of layers that see all, where there are two kinds."""
    settings = described.get("rope_parameters") or {}
    return settings.get("full_attention") or settings


def factors(described: Fields) -> dict[str, list[float]]:
    """Divisors of the rotary frequencies, half a head of them each, by the names of their tensors."""
    settings = _rotations(described)
    if settings.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _slowed(described, settings)}
    if settings.get("rope_type") == "longrope":
        return {
            f"rope_factors_{name}.weight": list(map(float, settings[f"{name}_factor"])) for name in ("long", "short")
        }
    return {}


def _slowed(described: Fields, settings: Fields) -> list[float]:
    """Long waves by a factor, short ones not at all, in between by a line: "llama3" of transformers."""
    factor, seen = float(settings["factor"]), float(settings["original_max_position_embeddings"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    size = head_size(described)
    waves = [2 * math.pi * float(settings["rope_theta"]) ** (i / size) for i in range(0, size, 2)]
    shares = [min(max((seen / wave - low) / (high - low), 0.0), 1.0) for wave in waves]
    return [1 / (share + (1 - share) / factor) for share in shares]


def _short(value: Any) -> str:
    return f"{value!s:.60}"
