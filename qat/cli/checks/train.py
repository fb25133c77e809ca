"""Checks training: some parameters are trained, the loss is defined, and every process has work."""

import math

from qat.checkpoint_files import REMEDY, adapters_of, find, has_adapters, refuse_other_adapters
from qat.cli.checks.checkpoint import manifest, start
from qat.config import Config, DataSource, LossConfig, Stage, TrainConfig
from qat.distill.lengths import pattern
from qat.errors import ArtifactError, ConfigError
from qat.names import TRAINS
from qat.processes import place

LORA = "lora"  # the option whose layers stay as they are
CONVERSATIONS = (DataSource.chat_jsonl, DataSource.alpaca)  # sources with answers that are there


def check(config: Config) -> None:
    """The layers that learn are quantized, something in them learns, and batches suffice; the loss holds together."""
    if config.stage in TRAINS:
        _check_mode(config)
        _check_learning(config)
        _check_adapters(config)
        _check_batches(config)
        _check_lengths("train", config.train, config)
        if config.first and config.stage is Stage.run:
            _check_lengths("first.train", config.first.train, config)
    _check_loss(config.loss)
    if config.stage in (*TRAINS, Stage.cache, Stage.convert, Stage.evaluate):
        _check_answers(config)


def _check_mode(config: Config) -> None:
    """Checks that the layers that are trained are quantized."""
    quant, whose = {"mlp": config.quant.mlp, "attn": config.quant.attn}, f"quant={config.quant.name}"
    described = manifest(config) if config.stage is Stage.distill else None
    if config.stage is Stage.distill and config.checkpoint.path and described is None:
        return  # a V2 state dict: its tensors describe it, there is no manifest
    if described is not None:
        quant, whose = described["quant"], f"checkpoint={config.checkpoint.path}"
    elif config.quant.layers or config.quant.candidates:
        return  # which layers have a format is known from the teacher's layers
    learning = {"mlp": config.mode.mlp, "attn": config.mode.attn}
    for kind, learns in learning.items():
        if learns and not (quant.get(kind) or quant.get("layers")):
            fitting = [f"mode={kind}" for kind in ("mlp", "attn") if quant.get(kind)]
            fitting = [f"mode.{kind}=false"] if config.mode.rank and fitting else fitting
            raise ConfigError(
                f"mode={config.mode.name} trains the {kind} layers, for which {whose} has no format"
                + (f": use {fitting[0]}" if fitting else "")
            )
    if not any(learning.values()) and not config.mode.embed:
        raise ConfigError("mode.mlp, mode.attn and mode.embed are all false: nothing would learn")


def _check_learning(config: Config) -> None:
    learn = config.train.learn
    if config.mode.rank:
        return  # adapters learn, and nothing else
    if not any((learn.scales, learn.codebooks, learn.latent, learn.norms)):
        raise ConfigError("train.learn.scales, codebooks, latent and norms are all 0: nothing would learn")


def _check_adapters(config: Config) -> None:
    """Checks that adapters learn alone, that they go on with those that are there, and that nothing learns beside."""
    mode, learn, described = config.mode, config.train.learn, manifest(config)
    brought = described is not None and has_adapters(described)
    if config.first and config.first.mode.rank:
        raise ConfigError(
            f"first.mode.rank={config.first.mode.rank}: the student that is trained first is converted, and adapters"
            " are not: use another first.mode"
        )
    if not mode.rank and brought:
        raise ConfigError(
            f"mode={mode.name}: checkpoint={config.checkpoint.path} has adapters, beside which nothing else learns: use"
            " mode=lora, or the checkpoint that they were trained on"
        )
    if not mode.rank and mode.name == LORA:
        raise ConfigError(
            f"mode.rank=0: mode={LORA} trains adapters of some rank, as with mode.rank=8; mode=e2e trains the layers"
            " themselves"
        )
    if not mode.rank:
        return
    if brought:
        _check_same_adapters(config)
    if mode.embed:
        raise ConfigError("mode.embed=true: adapters are for layers of the decoder: use mode.rank=0, as mode=e2e has")
    for kind in ("latent", "norms"):
        if (rate := getattr(learn, kind)) > 0:
            raise ConfigError(
                f"train.learn.{kind}={rate:g}: with mode.rank={mode.rank} adapters learn and the student stays as it"
                f" is: use train.learn.{kind}=0, or mode=e2e"
            )


def _check_same_adapters(config: Config) -> None:
    """Checks that the adapters of the checkpoint have the rank and the alpha of those that are to learn."""
    place = start(config)
    assert place is not None  # it has a manifest
    try:
        known = adapters_of(find(place), REMEDY)
    except ArtifactError as error:
        raise ConfigError(f"checkpoint={place}: {error}") from None
    refuse_other_adapters(known, (config.mode.rank, config.mode.alpha))


def _check_batches(config: Config) -> None:
    """Checks that every process gets at least one sequence of each batch."""
    if config.train.batch_size < config.instance.devices:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: fewer sequences than instance.devices="
            f"{config.instance.devices}, so some would have nothing to do"
        )
    together = place().count
    if config.train.batch_size < together:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size}: fewer sequences than the {together} processes that share"
            " each batch, so some would have nothing to do"
        )


def _check_answers(config: Config) -> None:
    """Checks that a loss over answers gets text that says which tokens they are."""
    if not config.loss.kind.needs_answers or config.cache.path:
        return
    sources = [part.source for part in config.data.parts] or [config.data.source]
    other = next((source for source in sources if source not in CONVERSATIONS), None)
    if other is not None:
        named = " or ".join(f"data={source.name}" for source in CONVERSATIONS)
        raise ConfigError(
            f"loss={config.loss.name} learns from the answers of conversations, and data={config.data.name} has text of"
            f" source {other.name}, which has none that are given: use {named} with data.path=<file>"
        )


def _check_lengths(key: str, train: TrainConfig, config: Config) -> None:
    """Checks that sequences can be cut as told, and that the loss has nothing of a cache that knows them whole."""
    if train.shares and len(train.shares) != len(train.lengths):
        raise ConfigError(f"{key}.shares has {len(train.shares)} numbers for {len(train.lengths)} of {key}.lengths")
    for name, numbers, least in (("lengths", train.lengths, 2), ("shares", train.shares, 0)):
        if wrong := [number for number in numbers if not math.isfinite(number) or number < least or number == 0]:
            raise ConfigError(f"{key}.{name}: {wrong[0]} must be {f'at least {least}' if least else 'above 0'}")
    if not train.lengths:
        return
    if not config.loss.kind.needs_teacher or config.loss.hard > 0:
        raise ConfigError(
            f"{key}.lengths needs loss=full_kl loss.hard=0: what a cache says of a sequence is of the whole of it"
        )
    if not config.cache.path:  # whose length is known once it is opened
        pattern(train.lengths, train.shares, train.batch_size, config.cache.length)


def _check_loss(loss: LossConfig) -> None:
    if loss.kind.needs_tail and loss.temperature != 1:
        raise ConfigError(
            f"loss.temperature={loss.temperature}: {loss.name} works at 1, where the cache knows the tail's mass"
        )
    for key, value, only in (("temperature", loss.temperature, 1.0), ("hard", loss.hard, 0.0)):
        if loss.kind.needs_answers and value != only:
            raise ConfigError(f"loss.{key}={value:g}: loss={loss.name} has no teacher, so it has to be {only:g}")
