"""What a folder's `config.json` stands for: a causal language model of transformers, or none."""

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qat.errors import ConfigError

CAUSAL = ("ForCausalLM", "LMHeadModel")  # endings of the class names of causal language models in transformers


def check(config: PreTrainedConfig, where: object) -> None:
    """Refuses whatever does not predict the next token of a text.

    Raises:
        ConfigError: an encoder, a model with both, one with another head, or one whose text part is none by itself.
    """
    name = _class(config)
    if config.is_encoder_decoder:
        raise ConfigError(f"{where} holds a {name}, which reads with an encoder: only decoders fit here")
    text = text_of(config)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        part = " and its text part" if text is not config else ""
        raise ConfigError(f"{where} holds a {name}, and transformers has no causal language model of it{part} alone")
    if text is config and not any(str(named).endswith(CAUSAL) for named in config.architectures or CAUSAL):
        raise ConfigError(f"{where} holds a {name}, which is no causal language model: name a folder with one")


def text_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that is about text; all of it for most models."""
    return config.get_text_config(decoder=True)


def quantization(config: PreTrainedConfig) -> dict[str, object]:
    """How the weights are quantized, as `quantization_config` says; empty for plain ones."""
    found = getattr(config, "quantization_config", None) or getattr(text_of(config), "quantization_config", None)
    return dict(found or {})


def is_plain(config: PreTrainedConfig) -> bool:
    """Whether the folder holds a text model alone, in plain numbers."""
    return text_of(config) is config and not quantization(config)


def _class(config: PreTrainedConfig) -> str:
    """The class that a folder names, else the kind of its configuration."""
    return str((config.architectures or [config.model_type])[0])
