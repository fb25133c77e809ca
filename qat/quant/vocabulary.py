"""Which matrices of vocabulary × hidden are quantized: embedding and head, which may be one tensor with two jobs.

Half of a small model's file is in them, so they are quantized like any other weight. A tied pair is one layer, in
the role of the embedding, whose rows are looked up and whose product makes logits.
"""

from torch import nn

from qat.config import QuantConfig, WeightConfig
from qat.errors import ConfigError
from qat.quant.embedding import ends


def chosen(model: nn.Module, quant: QuantConfig) -> dict[str, tuple[str, WeightConfig]]:
    """Role and format of each of a model's matrices of vocabulary × hidden that `quant` covers, by its name.

    Raises:
        ConfigError: it says two things of one tensor, or of two tensors only one thing, or the model has none such.
    """
    if quant.embed is None and quant.head is None:
        return {}
    found = ends(model)
    if found.tied:
        _refuse_two(quant)
    else:
        _refuse_one(quant)
    wanted = {"embed": (found.embed, nn.Embedding)} | ({} if found.tied else {"head": (found.head, nn.Linear)})
    made = {}
    for role, (name, kind) in wanted.items():
        settings: WeightConfig | None = getattr(quant, role)
        if settings is not None:
            made[_known(model, role, name, kind)] = role, settings
    return made


def _known(model: nn.Module, role: str, name: str | None, kind: type[nn.Module]) -> str:
    module = None if name is None else model.get_submodule(name)
    known = isinstance(module, nn.Embedding) if kind is nn.Embedding else type(module) is kind
    if name is None or not known:
        raise ConfigError(
            f"quant.{role} is set, and {type(model).__name__} has no {kind.__name__} of its own there but"
            f" {type(module).__name__ if module is not None else 'none'}: set quant.{role}=null"
        )
    return name


def _refuse_two(quant: QuantConfig) -> None:
    """One tensor has one format."""
    if quant.head is not None and quant.head != quant.embed:
        what = "quant.head is set and quant.embed is not" if quant.embed is None else "quant.head is not quant.embed"
        raise ConfigError(
            f"{what}: embedding and head are one tensor in this model, which has the format of quant.embed;"
            f" set {'quant.embed, and ' if quant.embed is None else ''}quant.head=null"
        )


def _refuse_one(quant: QuantConfig) -> None:
    """Of two tensors none stays dense by mistake."""
    if (quant.embed is None) != (quant.head is None) and not quant.partial:
        there, missing = ("embed", "head") if quant.head is None else ("head", "embed")
        raise ConfigError(
            f"quant.{there} is set and quant.{missing} is not: embedding and head are two tensors in this model, and"
            f" one would stay dense; set quant.{missing} too, or quant.partial=true to leave it so on purpose"
        )
