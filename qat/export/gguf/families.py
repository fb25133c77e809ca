"""Architectures that llama.cpp knows, and what a GGUF file says of each. Nothing here imports torch."""

import math
from dataclasses import dataclass
from typing import Any

from qat.errors import ConfigError
from qat.suggest import did_you_mean

Fields = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes models of a type of transformers.

    Attributes:
        name: what it calls them.
        interleaved: it turns neighbouring outputs of queries and keys as pairs, where transformers pairs those half
            a head apart, so rows lie in another order.
    """

    name: str
    interleaved: bool = False


FAMILIES = {  # by `model_type`
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
}


def refuse_architecture(described: Fields) -> None:
    """Looks whether llama.cpp computes what a `config.json` describes.

    Raises:
        ConfigError: it has no code for it, or this export does not know how to tell it.
    """
    kind = str(described.get("model_type"))
    if kind not in FAMILIES:
        raise ConfigError(
            f"export=gguf does not write models of type {kind}{did_you_mean(kind, FAMILIES)}; it knows"
            f" {', '.join(FAMILIES)}: export=hf is dense, and llama.cpp's own converter takes it on"
        )
    activation = described.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"llama.cpp computes models of type {kind} with silu, and this one has {activation}")
    if described.get("use_sliding_window", kind == "mistral") and described.get("sliding_window"):
        raise ConfigError(
            f"llama.cpp computes models of type {kind} without windows, and this one has sliding_window"
            f" {described['sliding_window']}"
        )
    rope(described)


def fields(described: Fields) -> Fields:
    """The numbers of a model by their names in a GGUF file, without the architecture before them."""
    heads = described["num_attention_heads"]
    size = head_size(described)
    return {
        "context_length": described["max_position_embeddings"],
        "embedding_length": described["hidden_size"],
        "block_count": described["num_hidden_layers"],
        "feed_forward_length": described["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": described.get("num_key_value_heads") or heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(described["rms_norm_eps"]),
        "rope.dimension_count": size,
        "vocab_size": described["vocab_size"],
        **rope(described),
    }


def head_size(described: Fields) -> int:
    """The number of outputs of an attention head."""
    return int(described.get("head_dim") or described["hidden_size"] // described["num_attention_heads"])


def rope(described: Fields) -> Fields:
    """The fields about rotary embeddings.

    Raises:
        ConfigError: they are stretched in a way that this export does not know how to tell.
    """
    settings = described.get("rope_parameters") or {}
    kind, said = settings.get("rope_type", "default"), {"rope.freq_base": float(settings.get("rope_theta", 10_000.0))}
    if kind in ("default", "llama3"):  # scaling of kind "llama3" is stored as a tensor
        return said
    if kind == "linear":
        return said | {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
    if kind == "yarn" and set(settings) <= {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}:
        return said | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(settings["factor"]),
            "rope.scaling.original_context_length": int(settings["original_max_position_embeddings"]),
        }
    raise ConfigError(
        f"export=gguf does not know how to tell llama.cpp of rotations of type {kind} with {', '.join(settings)}:"
        " export=hf is dense, and llama.cpp's own converter takes it on"
    )


def slowed(described: Fields) -> list[float]:
    """Divisors of the rotary frequencies, half a head of them; none where they are not scaled.

    Long waves by a factor, short ones not at all, in between by a line: "llama3" of transformers.
    """
    settings = described.get("rope_parameters") or {}
    if settings.get("rope_type") != "llama3":
        return []
    factor, seen = float(settings["factor"]), float(settings["original_max_position_embeddings"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    size = head_size(described)
    waves = [2 * math.pi * float(settings["rope_theta"]) ** (i / size) for i in range(0, size, 2)]
    shares = [min(max((seen / wave - low) / (high - low), 0.0), 1.0) for wave in waves]
    return [1 / (share + (1 - share) / factor) for share in shares]
