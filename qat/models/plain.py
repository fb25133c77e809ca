"""Folders whose weights are quantized, or lie inside a model of more than text, as plain ones.

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
from qat.errors import ConfigError
from qat.models import architecture, reading
from qat.models.reading import Stored, understood

log = logging.getLogger(__name__)

APART = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the logits' norm: rounding alone
PROBE = 24  # tokens


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
        _refuse_unscaled(source, tensors)
        model = _dequantized(source, config, method)
    else:
        log.info("%s is a model of more than text: taking its text part", source)
        model = reading.read(source, "auto", _class(config, source), config=config)
    alone = _text_alone(source, model, text)
    save(alone, folder)
    for file in model_files.text(source):
        shutil.copyfile(file, folder / file.name)
    if text is not config:
        _refuse_another(source, model, reading.read(folder, model.dtype))


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model under the names that a model of its class has by itself, whatever it was read from."""
    settings = model.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config  # the weights are plain numbers from here on
    with torch.device("meta"):  # no second set of weights
        made = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    made.save_pretrained(folder)


def _dequantized(source: Path, config: PreTrainedConfig, method: dict[str, Any]) -> PreTrainedModel:
    """The model of a quantized folder in fp32, which holds the products of its numbers and scales as they are."""
    failing = f"is quantized ({method.get('quant_method')}) and transformers cannot make plain weights of it here"
    remedy = "name the model that it was made from"
    if not AutoHfQuantizer.supports_quant_method(method):
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
    alone = reading.skeleton(text, source)
    if type(alone) is type(model):
        return model
    decoder = model.get_decoder()
    weights = {f"{alone.base_model_prefix}.{name}": value for name, value in decoder.state_dict().items()}
    head, place = model.get_output_embeddings(), _name_of(alone, alone.get_output_embeddings())
    weights |= {f"{place}.{name}": value for name, value in head.state_dict().items()}
    with understood(f"the text part of {source} is no {type(alone).__name__}"):
        alone.load_state_dict(weights, assign=True)
    return alone


def _name_of(model: Any, module: Any) -> str:
    return next(name for name, found in model.named_modules() if found is module)


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


def _refuse_unscaled(source: Path, tensors: dict[str, Stored]) -> None:
    """8-bit floating-point numbers mean nothing without a scale, and transformers would take them as they are."""
    scaled = {name.rpartition(".")[0] for name in tensors if "scale" in name.rpartition(".")[2]}
    found = [name for name, tensor in tensors.items() if tensor.kind.startswith("F8") and "scale" not in name]
    if bare := [name for name in found if name.rpartition(".")[0] not in scaled]:
        raise ConfigError(f"{source} has no scale for {reading.listed(bare)}: {model_files.REMEDY}")
