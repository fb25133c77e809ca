"""Checks that a model and its teacher support what a run needs, before the run does anything."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qat import checkpoints
from qat.checkpoint_files import find, has_adapters
from qat.config import Config, DataConfig, DataSource, ModeConfig, QuantConfig, Stage, Start
from qat.data import mix
from qat.data.asking import asked
from qat.data.thinking import user_turn
from qat.errors import ConfigError
from qat.export.exporter import exporter
from qat.machine import Machine
from qat.models import ModelFolder, tokenizers
from qat.models.reading import listed
from qat.models.streamed import matrix_of
from qat.quant.architectures import Layer, learns, select
from qat.quant.places import place

CONVERTS = (Stage.run, Stage.convert)
TRAINS = (Stage.run, Stage.distill)
EXPORTED = (*CONVERTS, Stage.distill, Stage.export)  # stages whose student `export` is for, now or later


def check(config: Config, model: ModelFolder, teacher: ModelFolder, machine: Machine) -> None:
    """Looks at text, layers and every weight.

    Args:
        config: of the run.
        model: the one that is quantized.
        teacher: what its student is to imitate; the model itself, or another one of the same tokens.
        machine: type and device.

    Raises:
        ConfigError: in one sentence, what would not work.
    """
    if makes_text(config):
        check_text(config, teacher)
    layers = check_student(config, model, _manifest(config, model) if config.stage in EXPORTED else None)
    if config.stage in EXPORTED:
        exporter(config.export.format).refuse_tokenizer(model)
    if config.stage is Stage.export:  # which loads the model itself, in its own type
        return
    if teacher is not model:
        _loaded(config, teacher, machine)
    if teacher is model or config.stage is not Stage.cache:
        _refuse_zeros(_loaded(config, model, machine), layers, model)


def makes_text(config: Config) -> bool:
    """Whether a stage turns text into tokens, or tokens into text that somebody asked for."""
    if config.stage is Stage.evaluate and config.evaluate.apart:
        return True
    makes_cache = config.stage is not Stage.export and not config.cache.path
    return makes_cache or config.cache.inspect


def check_text(config: Config, teacher: ModelFolder) -> None:
    """Whether there is a tokenizer of the model's, and a chat template where the text needs one."""
    tokenizer = teacher.tokenizer()
    tokenizers.check(teacher.path, tokenizer, teacher.vocab_size())
    if config.cache.path or config.evaluate.apart:
        return
    for part in mix.parts(config.data):
        if _talks(part):
            asked(tokenizer, "?")
        if part.source is DataSource.selfgen and part.start is Start.questions:
            user_turn(tokenizer)


def check_student(config: Config, model: ModelFolder, start: dict[str, Any] | None) -> list[Layer]:
    """Looks at the layers of a student, and whether the tool that `export` names can hold them.

    Args:
        config: of the run.
        model: what the student is made from, of which names and shapes are enough.
        start: what the checkpoint says of itself that the run starts from; None for a V2 state dict.

    Returns:
        The layers that are to be quantized.

    Raises:
        ConfigError: in one sentence, what would not work.
    """
    converts = config.stage in CONVERTS and _converts(config, model, start)
    if converts and start is not None:
        _refuse_adapted(config, start)
    layers = check_layers(config, model) if converts else []
    if config.stage is Stage.distill and start:
        check_mode(config.mode, checkpoints.layers_of(start), model)
    if config.stage in EXPORTED:
        _check_export(config, model, start["layers"] if start and not layers else checkpoints.entries(layers))
    return layers


def _check_export(config: Config, model: ModelFolder, layers: dict[str, dict[str, Any]]) -> None:
    """Whether a tool knows the architecture, and its types hold such layers, before hours go into them."""
    form = exporter(config.export.format)
    form.refuse_architecture(model.settings().to_dict())
    form.refuse_layers(layers, config.export)
    form.refuse_classes(model.skeleton(), layers, config.export)
    if config.stage in TRAINS and config.mode.rank:
        form.refuse_adapters(True, config.export)


def check_layers(config: Config, model: ModelFolder) -> list[Layer]:
    """The layers that are to be quantized, those that are to learn among them."""
    found: list[Layer] = []
    for quant, mode in _wanted(config):
        layers = select(model.skeleton(), quant)
        if config.stage in TRAINS:
            check_mode(mode, layers, model)
        found += layers
    return found


def _refuse_adapted(config: Config, start: dict[str, Any]) -> None:
    """Refuses to convert a checkpoint with adapters, which would be lost."""
    if has_adapters(start):
        raise ConfigError(
            f"checkpoint={config.checkpoint.path} has adapters and is to be converted to quant={config.quant.name},"
            " which would lose them: start from the checkpoint that they were trained on, or convert what"
            " export=hf export.merge=true writes, with model=local"
        )


def _loaded(config: Config, folder: ModelFolder, machine: Machine) -> PreTrainedModel:
    """One of the two, each of its numbers looked at; a conversion alone does not need all decoder layers at once."""
    load = folder.stream if config.stage is Stage.convert else folder.load
    return load(machine.dtype, machine.device)


def _refuse_zeros(model: PreTrainedModel, layers: list[Layer], folder: ModelFolder) -> None:
    """Refuses layers of zeros, to which nothing can be fitted."""
    empty = [layer.name for layer in layers if not bool(matrix_of(model, layer.name).any())]
    if empty:
        raise ConfigError(f"{folder.path} has nothing but zeros in {listed(empty)}, to which no format fits")


def _wanted(config: Config) -> list[tuple[QuantConfig, ModeConfig]]:
    first = [(config.first.quant, config.first.mode)] if config.first else []
    return [*first, (config.quant, config.mode)]


def check_mode(mode: ModeConfig, layers: list[Layer], model: ModelFolder) -> None:
    """Refuses to train a role of which none is quantized, and adapters that some layer cannot have.

    Raises:
        ConfigError: with the mode that has something to train.
    """
    roles = {layer.role for layer in layers}
    for role, asked_for in {"mlp": mode.mlp, "attn": mode.attn}.items():
        if asked_for and role not in roles:
            raise ConfigError(
                f"mode={mode.name} trains the {role} layers, and none of {model.name} is quantized: use"
                f" {f'mode.{role}=false' if mode.rank else f'mode={next(iter(roles))}'}"
            )
    for layer in layers if mode.rank else []:
        if learns(mode, layer.role, layer.format):
            _check_adapter(mode.rank, layer, model)


def _check_adapter(rank: int, layer: Layer, model: ModelFolder) -> None:
    """Refuses an adapter for an expert of a stack, and one that has more ranks than the layer."""
    found = place(model.skeleton(), layer.name)
    if found is not None and found.number is not None:
        raise ConfigError(
            f"mode.rank={rank}: {layer.name} of {model.name} is an expert, which shares a tensor with others and can"
            f" have no adapter: use mode.{layer.role}=false"
        )
    if rank > min(layer.shape):
        outputs, inputs = layer.shape
        raise ConfigError(
            f"mode.rank={rank}: {layer.name} of {model.name} is {outputs} × {inputs} and has no more than"
            f" {min(layer.shape)} ranks: use that or fewer"
        )


def _converts(config: Config, model: ModelFolder, start: dict[str, Any] | None) -> bool:
    """Whether a conversion is to be made; not from a checkpoint that has the formats already."""
    if config.stage is Stage.convert or config.checkpoint.path is None or config.first:
        return True
    return start is not None and not checkpoints.has_formats(start, config.quant, model)


def _manifest(config: Config, model: ModelFolder) -> dict[str, Any] | None:
    """What the checkpoint says that a run starts from; None for a V2 state dict, which tells when it is loaded."""
    found = find(Path(str(config.checkpoint.path)).expanduser()) if config.checkpoint.path else None
    return checkpoints.native.check(found, model) if found and found.is_dir() else None


def _talks(part: DataConfig) -> bool:
    """Whether a source's text goes through the chat template."""
    if part.source is DataSource.selfgen:
        return part.start in (Start.prompts, Start.questions)
    return not part.source.plain
