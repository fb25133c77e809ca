"""The formats that a layer may have: from a pattern of names, else its role, else all candidates of a budget.

With one of them a layer has it, with none it stays dense, and of several the budget takes one (`qat.quant.budget`).
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from qat.config import SETTINGS, QuantConfig, WeightConfig, as_plain
from qat.errors import ConfigError
from qat.quant import formats
from qat.quant.formats import Format
from qat.suggest import did_you_mean, nearest

Shape = tuple[int, int]


def format_of(settings: WeightConfig) -> Format:
    """The format that a configuration asks for."""
    return formats.of({name: as_plain(getattr(settings, name)) for name in ("format", *SETTINGS[settings.format])})


def options(name: str, role: str, shape: Shape, quant: QuantConfig) -> list[Format]:
    """The formats that a layer may have, without duplicates.

    Of a budget's candidates only those that suit the shape; the first, for a message, if none does.
    """
    if pattern := pattern_of(name, quant):
        settings = quant.layers[pattern]
        return [format_of(settings)] if settings else []
    if settings := of_role(role, quant):
        return [format_of(settings)]
    candidates = list(dict.fromkeys(map(format_of, quant.candidates)))
    return [one for one in candidates if one.misfit(*shape) is None] or candidates[:1]


def asks(role: str, quant: QuantConfig) -> bool:
    """Whether layers of a role are to be quantized where no pattern says otherwise."""
    return of_role(role, quant) is not None or bool(quant.candidates)


def of_role(role: str, quant: QuantConfig) -> WeightConfig | None:
    """The settings for layers of a role."""
    settings: WeightConfig | None = getattr(quant, role)
    return settings


def pattern_of(name: str, quant: QuantConfig) -> str | None:
    """The last pattern that matches a layer's name, if any."""
    return next((pattern for pattern in reversed(quant.layers) if fnmatchcase(name, pattern)), None)


def key_of(name: str, role: str, quant: QuantConfig) -> str:
    """The configuration key that decides a layer's format; of candidates that none suits, the first."""
    if pattern := pattern_of(name, quant):
        return f"quant.layers[{pattern}]"
    return f"quant.{role}" if of_role(role, quant) else "quant.candidates[0]"


def refuse_idle(quant: QuantConfig, names: Collection[str], tied: Mapping[str, str]) -> None:
    """Refuses a pattern that fits no layer.

    Args:
        quant: the patterns.
        names: of the layers.
        tied: the layer in which a module has its weight, where that is another's.

    Raises:
        ConfigError: a pattern fits none; the message says which is like it, and a layer with a similar name.
    """
    for pattern in quant.layers:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        if owner := next((tied[name] for name in tied if fnmatchcase(name, pattern)), None):
            raise ConfigError(
                f"quant.layers[{pattern}] has its weight in {owner}, to which this model ties it: name that"
            )
        like = nearest(pattern, names) or next(iter(names), "")
        meant = did_you_mean(pattern, dict.fromkeys(_like(pattern, name) for name in names))
        raise ConfigError(f"quant.layers[{pattern}] fits no layer of this model{meant}, whose names are like {like}")


def _like(pattern: str, name: str) -> str:
    """A pattern for a layer that begins, or ends, with a star if another one does, and has as many parts."""
    parts, wanted = name.split("."), pattern.split(".")
    if wanted[0] == "*":
        return ".".join(["*", *parts[1 - len(wanted) :]]) if len(wanted) > 1 else name
    return ".".join([*parts[: len(wanted) - 1], "*"]) if wanted[-1] == "*" else name
