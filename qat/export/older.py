"""`config.json` for readers that are older than transformers 5, or read it by themselves.

transformers 5 moved some settings and renamed others. Readers that look where these were before mostly take a default
of their own without a word, so each is written in both places; transformers reads either.
"""

from typing import Any

# What is said of files and not of the model, or of weights as the teacher has them.
NOT_THE_MODEL = {
    *("quantization_config", "transformers_weights", "auto_map", "_name_or_path", "_commit_hash"),
    *("dtype", "torch_dtype", "transformers_version", "architectures", "model_type"),
}
# What architectures with names of their own called the base of rotations and the part of a head that is rotated.
BASES = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base", "modernbert-decoder": "global_rope_theta"}
LOCAL_BASES = {"modernbert-decoder": "local_rope_theta"}
PARTS = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
PERIODS = {"sliding_attention": "sliding_window_pattern", "linear_attention": "full_attention_interval"}


def with_older_keys(described: dict[str, Any], original: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """A `config.json` as transformers writes it, and beside each setting that moved its older form.

    Args:
        described: what transformers writes.
        original: the teacher's own file, whose settings go by the names under which its architecture was published.
        aliases: today's name of each older one (`PreTrainedConfig.attribute_map`).
    """
    older = {key: value for key, value in original.items() if key not in NOT_THE_MODEL}
    older |= {alias: described[name] for alias, name in aliases.items() if name in described}
    older |= _rotations(described) | _period(described.get("layer_types") or [])
    if "dtype" in described:
        older["torch_dtype"] = described["dtype"]
    return older | described


def _rotations(described: dict[str, Any]) -> dict[str, Any]:
    """Base, part and scaling of rotary embeddings where they were before `rope_parameters` had them."""
    rope, kind = described.get("rope_parameters") or {}, described.get("model_type", "")
    whole, local = rope.get("full_attention", rope) or {}, rope.get("sliding_attention") or {}
    if "rope_theta" not in whole:
        return {}
    scaling = {key: value for key, value in whole.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaled = scaling.get("rope_type", "default") != "default"
    found = {
        BASES.get(kind, "rope_theta"): whole["rope_theta"],
        "rope_scaling": {"type": scaling["rope_type"], **scaling} if scaled else None,
    }
    if "rope_theta" in local:
        found[LOCAL_BASES.get(kind, "rope_local_base_freq")] = local["rope_theta"]
    if "partial_rotary_factor" in whole:
        found[PARTS.get(kind, "partial_rotary_factor")] = whole["partial_rotary_factor"]
    return found


def _period(layers: list[str]) -> dict[str, int]:
    """After how many layers of another kind whole attention comes again, where that is always so."""
    if "full_attention" not in layers:
        return {}
    period = layers.index("full_attention") + 1
    kinds = {kind for number, kind in enumerate(layers, 1) if number % period}
    if any((kind == "full_attention") != (number % period == 0) for number, kind in enumerate(layers, 1)):
        return {}
    return {PERIODS[kind]: period for kind in kinds if kind in PERIODS and len(kinds) == 1}
