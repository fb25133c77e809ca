"""Converts folders with quantized weights, or with a text model inside a larger one, to plain text models.

transformers reads them; what is written is an ordinary folder of the text model, made once and kept as an
artifact, so that nothing downstream has to know.
"""

import logging
import shutil
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from qat import model_files
from qat.artifacts import require_space
from qat.errors import ConfigError
from qat.models import architecture, reading
from qat.models.reading import understood
from qat.models.tensors import Stored, refuse_unscaled

log = logging.getLogger(__name__)

# Allowed difference of logits, relative to their norm: rounding alone.
APART = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PROBE = 24  # tokens on which the logits are compared


def write(source: Path, config: PreTrainedConfig, tensors: dict[str, Stored], folder: Path) -> None:
    """Writes the text model of a folder in plain numbers, with its tokenizer.

    Args:
        source: the folder.
        config: its `config.json`.
        tensors: what its files hold.
        folder: a new one.

    Raises:
        ConfigError: transformers cannot dequantize it here, or has no text model that computes the same.
    """
    method, text = architecture.quantization(config), architecture.text_of(config)
    if method:
        log.info("%s is quantized (%s): making plain weights of it", source, method.get("quant_method"))
        refuse_unscaled(source, tensors)
        model = _dequantized(source, config, method)
    else:
        log.info("%s is a model of more than text: taking its text part", source)
        model = reading.read(source, "auto", _class(config, source), config=config)
    save(model if text is config else _text_alone(source, model, text), folder)
    for file in model_files.text(source):
        shutil.copyfile(file, folder / file.name)
    if text is not config:
        _refuse_another(source, model, reading.read(folder, model.dtype))


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model under the names that a model of its class has by itself, whatever it was read from."""
    settings = model.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config  # the weights are plain numbers from here on
    with reading.LOADING, torch.device("meta"):  # on the meta device, so that the weights are not allocated twice
        made = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    require_space(folder, needed, f"the plain weights of {folder.name}")
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    made.save_pretrained(folder)


def _dequantized(source: Path, config: PreTrainedConfig, method: dict[str, Any]) -> PreTrainedModel:
    """The model of a quantized folder in fp32, which holds the products of its numbers and scales as they are."""
    failing = f"is quantized ({method.get('quant_method')}) and transformers cannot make plain weights of it here"
    remedy = "name the model that it was made from"
    if not (method.get("quant_method") and AutoHfQuantizer.supports_quant_method(method)):
        raise ConfigError(f"{source} {failing}, as it does not know the method: {remedy}")
    failing += f": install what it asks for, or {remedy}"
    with understood(f"{source} {failing}"):
        if hasattr(AutoQuantizationConfig.from_dict(dict(method)), "dequantize"):
            _owner(config).quantization_config = method | {"dequantize": True}
        auto = AutoModelForCausalLM if architecture.text_of(config) is config else _class(config, source)
        model = reading.read(source, torch.float32, auto, failing, config=config)
        return model.dequantize(torch.float32) if getattr(model, "is_quantized", False) else model


def _owner(config: PreTrainedConfig) -> Any:
    """The configuration that says how weights are quantized: the whole one or its text part."""
    return config if getattr(config, "quantization_config", None) else architecture.text_of(config)


def _class(config: PreTrainedConfig, source: Path) -> Any:
    """The class of a model of more than text, as its folder names it."""
    name = str((config.architectures or [""])[0])
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config)):
        raise ConfigError(f"{source} names {name or 'no class'} in its architectures, which transformers does not have")
    return found


def _text_alone(source: Path, model: PreTrainedModel, text: PreTrainedConfig) -> PreTrainedModel:
    """The text model on its own, on the weights of the whole."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    text.tie_word_embeddings = head is not None and head.weight is embeddings.weight
    text.eos_token_id = _ends(source)
    alone = reading.skeleton(text, source)
    weights = _parts(model, alone)
    with understood(f"the text part of {source} is no {type(alone).__name__}"):
        alone.load_state_dict(weights, assign=True)
    alone.tie_weights()
    return alone


def _parts(model: PreTrainedModel, alone: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of the whole by their names in the text model; whatever else there is has no name there."""
    inside = list(model.modules())
    if whole := [module for module in inside if type(module) is type(alone)]:
        return whole[0].state_dict()
    prefix, base = alone.base_model_prefix, type(alone.base_model)
    weights = {
        f"{prefix}.{name}": value
        for module in inside
        if type(module) is base
        for name, value in module.state_dict().items()
    }
    place = next(name for name, found in alone.named_modules() if found is alone.get_output_embeddings())
    return weights | {f"{place}.{name}": value for name, value in model.get_output_embeddings().state_dict().items()}


def _ends(source: Path) -> list[int] | None:
    """The tokens that end a text, as both levels of a `config.json` name them."""
    described = model_files.settings(source)
    inner = [part for part in described.values() if isinstance(part, dict) and "vocab_size" in part]
    named = [part.get("eos_token_id") for part in (described, *inner)]
    flat = [token for entry in named for token in (entry if isinstance(entry, list) else [entry])]
    return sorted({token for token in flat if isinstance(token, int)}) or None


@torch.no_grad()
def _refuse_another(source: Path, whole: PreTrainedModel, alone: PreTrainedModel) -> None:
    """Compares the logits of the text model with those of the whole on some tokens."""
    vocabulary = alone.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, PROBE), generator=torch.Generator().manual_seed(0))
    with understood(f"{source} does not take text alone"):
        expected, found = (cast(Any, model)(input_ids=ids).logits.double() for model in (whole, alone))
    apart = float((found - expected).norm() / expected.norm())
    if not apart <= APART[alone.dtype]:
        raise ConfigError(
            f"the text part of {source} alone is not what the whole computes of text (logits differ by {apart:.1e} of"
            " their norm), so it cannot be taken out"
        )
