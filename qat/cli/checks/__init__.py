"""Values and combinations that cannot work, found before anything is created: a module for each section."""

from qat.cli.checks import (
    cache,
    chat,
    checkpoint,
    data,
    evaluate,
    export,
    instance,
    model,
    outputs,
    quant,
    store,
    train,
    values,
)
from qat.config import Config

SECTIONS = (values, quant, outputs, model, data, cache, store, checkpoint, train, instance, evaluate, chat, export)


def check(config: Config) -> None:
    """Checks every value by itself, then what they ask for together.

    Raises:
        QatError: the first that cannot work.
    """
    for section in SECTIONS:
        section.check(config)
