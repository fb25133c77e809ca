"""A family of models as a coming release of transformers may bring it: Llama's layers, all under other names."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer


def renamed(module: Any, **names: str) -> Any:
    """The module with other names for its parts, which its code finds all the same."""
    found = {old: property(lambda self, new=new: self._modules[new]) for old, new in names.items()}
    for old, new in names.items():
        setattr(module, new, module._modules.pop(old))
    module.__class__ = type(type(module).__name__, (type(module),), found)
    return module


class GizmoConfig(LlamaConfig):
    """Its settings."""

    model_type = "gizmo"


class GizmoForCausalLM(LlamaForCausalLM):
    """Decoder layers look and think."""

    config_class = GizmoConfig

    def __init__(self, config: GizmoConfig) -> None:
        """With random weights."""
        super().__init__(config)
        for layer in self.model.layers:
            assert isinstance(layer, LlamaDecoderLayer) and isinstance(layer.self_attn, LlamaAttention)
            renamed(layer.self_attn, q_proj="ask", k_proj="key", v_proj="say", o_proj="out")
            renamed(layer, self_attn="looker", mlp="thinker")


def register() -> None:
    """As transformers registers its own."""
    AutoConfig.register("gizmo", GizmoConfig, exist_ok=True)
    AutoModelForCausalLM.register(GizmoConfig, GizmoForCausalLM, exist_ok=True)


def write(folder: Path) -> GizmoForCausalLM:
    """A small one with a tokenizer over bytes, as a folder."""
    import torch

    from qat.models import tiny

    tiny.write(folder, 512)
    torch.manual_seed(0)
    settings = LlamaConfig.from_pretrained(folder).to_dict()
    model = GizmoForCausalLM(GizmoConfig(**{name: value for name, value in settings.items() if name != "model_type"}))
    model.save_pretrained(folder)
    return model
