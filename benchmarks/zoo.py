"""Every causal language model of the installed transformers, in small: random weights, made from its configuration.

A configuration class says what its architecture is; its default values make a model of some gigabytes. Here
each of its numbers that stands for a size is made small, by its name, and of its decoder layers a few are
kept that are of all kinds it has. Numbers that change what is computed and are neutral by default (scalings,
caps) are set to something, and norms and biases are not left at ones and zeros, so that ignoring one shows.
"""

import dataclasses
import json
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 512
KINDS = 6  # decoder layers kept, at most
TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
# The first pattern that a field's name matches decides; a size that is smaller already stays.
SIZES = {
    r".*vocab(_size|_size_.*|_base)?|n_vocab": VOCABULARY,
    r"(.*_)?num_(hidden_|encoder_|decoder_)?layers|n_layers?|num_blocks|(encoder|decoder)_layers|.*layers_per_stack": 2,
    r"mamba_(n|num)_heads": 8,
    r".*(num_attention_heads|n_heads?|num_heads|attention_heads|linear_num_heads|linear_num_value_heads)": 4,
    r".*(num_key_value_heads|num_kv_heads|kv_n_heads|linear_num_key_heads)": 2,
    r"(mamba_)?n(um)?_groups|mamba_ngroups|topk_group|n_group|num_expert_group": 1,
    r"qk_head_dim": 32,
    r".*(head_dim|d_head|headdim|head_size|kv_channels|d_kv|dim_head|rotary_dim)": 16,
    r"num_(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k": 2,
    r"(sliding_|attention_|keep_)?window(_size)?|sliding_window_size|attention_chunk_size": 16,
    r"(mamba_)?chunk_size": 16,
    r"local_attention(_window_len)?|attention_window_size|max_window_layers": 16,
    r".*lora_rank|.*low_?rank|.*(adapter|laurel|norm)_rank": 16,
    r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|d_ff|dim_ff|dff|n_inner|ffn_hidden_size|mlp_dim|feed_forward_size)": 96,
    r"d_inner|hidden_size_per_layer_input": 16,
    r"(.*_)?hidden_size(_global)?|d_model|n_embd|dim_model|embedding_size|lru_width|emb_dim|embedding_dim": 64,
    r"word_embed_proj_dim|(input|output)_embedding_size|(pronunciation|shape)_embed_dim|input_size": 64,
    r"max_position_embeddings|n_positions|max_seq_len|model_max_length|n_ctx|context_length": 1024,
    r"max_(target|source)_positions": 1024,
}
# What is computed with a number of its own, instead of the neutral one.
NUMBERS = {
    r".*(softcap|soft_cap|softcapping)": 5.0,
    r"logits_scaling": 4.0,
    r"logit_scale|lm_head_multiplier": 0.3,
    r"embedding_multiplier": 2.0,
    r"initializer_range|init_std": 0.2,
    r".*dropout.*|.*pdrop|.*layerdrop": 0.0,
}
# What follows from sizes in ways of its own, or has no default.
OTHERS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_head_dim": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
}


def architectures() -> dict[str, type[PreTrainedConfig]]:
    """Configuration classes by the name of the model type."""
    return {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}


def tiny(kind: type[PreTrainedConfig]) -> PreTrainedModel:
    """A model of a few hundred thousand weights, in fp32, the same every time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        small(kind()), dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
            elif parameter.std() == 0:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def small(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same kind of model with few and small layers."""
    known = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else vars(config)
    given = {name: value for name, value in vars(config).items() if name in known and not name.startswith("_")}
    kept = _kept(given)
    changed = {name: _small(name, value, kept) for name, value in given.items()}
    changed = {name: value for name, value in changed.items() if value is not given[name]}
    if given.get("num_key_value_heads") == given.get("num_attention_heads"):
        changed.pop("num_key_value_heads", None)
        changed |= {"num_key_value_heads": changed["num_attention_heads"]} if "num_key_value_heads" in given else {}
    tokens = {name: value for name, value in TOKENS.items() if name in given}
    return type(config)(**changed | tokens | OTHERS.get(config.model_type, {}))


def _small(name: str, value: Any, kept: dict[int, list[int]]) -> Any:
    """A field's value for a small model; the value itself where it does not depend on the size."""
    if isinstance(value, PreTrainedConfig):
        return small(value)
    if isinstance(value, list | tuple) and len(value) in kept:
        return type(value)(value[layer] for layer in kept[len(value)])
    if isinstance(value, dict) and value and all(isinstance(key, int) for key in value):
        layers = next(iter(kept.values()), [])
        return {new: value[old] for new, old in enumerate(layers) if old in value}
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    for pattern, size in SIZES.items():
        if isinstance(value, int) and re.fullmatch(pattern, name):
            size = len(next(iter(kept.values()))) if "layers" in pattern and value in kept else size
            return min(value, size)
    return next((type(value)(number) for pattern, number in NUMBERS.items() if re.fullmatch(pattern, name)), value)


def _kept(given: dict[str, Any]) -> dict[int, list[int]]:
    """The layers to keep of as many as a model has by default: the first of each kind, two at least."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    count = next((given[name] for name in names if given.get(name)), 0)
    lists = [value for value in given.values() if isinstance(value, list | tuple) and len(value) == count]
    if count <= 2 or not lists:
        return {}
    first: dict[str, int] = {}
    for layer in range(count):
        kinds = [values[layer] for values in lists if len({str(value) for value in values}) <= 4]
        first.setdefault(json.dumps(kinds, default=str), layer)
    layers = sorted(first.values())[:KINDS]
    return {count: layers if len(layers) > 1 else [0, 1]}
