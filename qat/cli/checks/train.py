"""Checks training: some parameters are trained, the loss is defined, and every process has work."""

import math

from qat.cli.checks.checkpoint import manifest
from qat.config import Config, LossConfig, Stage, TrainConfig
from qat.distill.lengths import pattern
from qat.errors import ConfigError
from qat.names import TRAINS
from qat.processes import place


def check(config: Config) -> None:
    """The layers that learn are quantized, something in them learns, and batches suffice; the loss holds together."""
    if config.stage in TRAINS:
        _check_mode(config)
        _check_learning(config)
        _check_batches(config)
        _check_lengths("train", config.train, config)
        if config.first and config.stage is Stage.run:
            _check_lengths("first.train", config.first.train, config)
    _check_loss(config.loss)


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
            raise ConfigError(
                f"mode={config.mode.name} trains the {kind} layers, for which {whose} has no format"
                + (f": use {fitting[0]}" if fitting else "")
            )
    if not any(learning.values()) and not config.mode.embed:
        raise ConfigError("mode.mlp, mode.attn and mode.embed are all false: nothing would learn")


def _check_learning(config: Config) -> None:
    learn = config.train.learn
    if not any((learn.scales, learn.codebooks, learn.latent, learn.norms)):
        raise ConfigError("train.learn.scales, codebooks, latent and norms are all 0: nothing would learn")


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
