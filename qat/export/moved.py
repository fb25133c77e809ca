"""`config.json` for readers that are older than transformers 5, or read it by themselves.

transformers 5 moved some settings and renamed others. Readers that look where these were before mostly take a default
of their own without a word, so each is written in both places.
"""

import warnings
from copy import deepcopy
from typing import Any

from transformers import PreTrainedConfig

from qat.models.reading import CONFUSED

# Settings that describe files and not the model, or the type of the teacher's weights.
NOT_THE_MODEL = {
    *("quantization_config", "transformers_weights", "auto_map", "_name_or_path", "_commit_hash"),
    *("dtype", "torch_dtype", "transformers_version", "architectures", "model_type"),
}
# Older names for the base of rotary embeddings and the share of a head that is rotated, by architecture.
BASES = {
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), "rotary_emb_base"),
    "modernbert-decoder": "global_rope_theta",
}
LOCAL_BASES = {"modernbert-decoder": "local_rope_theta"}
PARTS = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), "rotary_pct")
# Older names for the number of layers from one full-attention layer to the next, by the kind of the layers between.
PERIODS = {"sliding_attention": "sliding_window_pattern", "linear_attention": "full_attention_interval"}


def older_keys(described: dict[str, Any], original: dict[str, Any], kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Settings of a `config.json` in their older places, as far as transformers reads the same with them.

    Args:
        described: all settings as transformers has them, `dtype` included.
        original: the teacher's own file, whose settings go by the names under which its architecture was published.
        kind: the class of the configuration.
    """
    older = _rotations(described) | _period(described.get("layer_types") or [])
    if "n_positions" in described:
        older["n_ctx"] = described["n_positions"]  # files of GPT and GPT-2 have both, and mlx-lm asks for this one
    older |= {alias: described[name] for alias, name in kind.attribute_map.items() if name in described}
    older |= {key: value for key, value in original.items() if key not in NOT_THE_MODEL}
    wanted, found = _read(described, kind), {"torch_dtype": described["dtype"]}
    for key, value in older.items():
        if key not in described and _agrees(_read(described | found | {key: value}, kind), wanted):
            found[key] = value
    return found


def _read(described: dict[str, Any], kind: type[PreTrainedConfig]) -> dict[str, Any] | None:
    """What transformers makes of settings; None where it complains."""
    try:
        with warnings.catch_warnings(action="error"):
            return kind.from_dict(deepcopy(described)).to_dict()
    except (*CONFUSED, Warning):
        return None


def _agrees(found: dict[str, Any] | None, wanted: dict[str, Any] | None) -> bool:
    return found is not None and wanted is not None and all(found.get(key) == wanted[key] for key in wanted)


def _rotations(described: dict[str, Any]) -> dict[str, Any]:
    """Base, part and scaling of rotary embeddings where they were before `rope_parameters` had them."""
    rope, kind = described.get("rope_parameters") or {}, described.get("model_type", "")
    whole, local = rope.get("full_attention", rope) or {}, rope.get("sliding_attention") or {}
    if "rope_theta" not in whole:
        return {}
    scaling = {key: value for key, value in whole.items() if key not in ("rope_theta", "partial_rotary_factor")}
    found = {
        BASES.get(kind, "rope_theta"): whole["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }
    if "rope_theta" in local:
        found[LOCAL_BASES.get(kind, "rope_local_base_freq")] = local["rope_theta"]
    if "partial_rotary_factor" in whole:
        found[PARTS.get(kind, "partial_rotary_factor")] = whole["partial_rotary_factor"]
    return found


def _period(layers: list[str]) -> dict[str, int]:
    """After how many layers of one other kind whole attention comes again, where that is always so."""
    period = layers.index("full_attention") + 1 if "full_attention" in layers else len(layers) + 1
    between = {kind for number, kind in enumerate(layers, 1) if number % period}
    regular = all((kind == "full_attention") == (number % period == 0) for number, kind in enumerate(layers, 1))
    return {name: period for kind, name in PERIODS.items() if between == {kind} and regular and period <= len(layers)}
