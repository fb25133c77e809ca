"""Which matrices of vocabulary × hidden are quantized: embedding and head, which may be one tensor with two jobs.

Half of a small model's file is in them, so they are quantized like any other weight. A tied pair is one layer, in
the role of the embedding, whose rows are looked up and whose product makes logits.
"""

from torch import nn

from qat.config import QuantConfig
from qat.errors import ConfigError
from qat.quant import choice
from qat.quant.embedding import Ends, ends

ROLES = ("embed", "head")


def roles(model: nn.Module) -> dict[str, str]:
    """The role of each of a model's matrices of vocabulary × hidden, by its name; a tied pair is the embedding."""
    found = ends(model)
    names = {"embed": found.embed, "head": None if found.tied else found.head}
    return {name: role for role, name in names.items() if name is not None}


def matrices(model: nn.Module, quant: QuantConfig) -> dict[str, str]:
    """The role of each of a model's matrices of vocabulary × hidden that can be quantized, by its name.

    Raises:
        ConfigError: `quant` says two things of one tensor, or of two tensors only one thing, or there is none such.
    """
    asked = quant.embed is not None or quant.head is not None
    if asked:
        found = ends(model)
        _refuse_two(quant) if found.tied else _refuse_one(found, quant)
        for role, name, kind in _other(model):
            _refuse_other(model, role, name, kind)
    return possible(model)


def tied(model: nn.Module) -> dict[str, str]:
    """The name of the embedding that a model has as its head, by the head's name; nothing where they are two."""
    found = ends(model)
    return {found.head: found.embed} if found.tied and found.head and found.embed else {}


def possible(model: nn.Module) -> dict[str, str]:
    """The role of each of a model's matrices of vocabulary × hidden, by its name; none where one of them is unknown.

    Other code that multiplies with the embedding would not find its matrix, so both modules are checked.
    """
    return {} if _other(model) else roles(model)


def _other(model: nn.Module) -> list[tuple[str, str | None, type[nn.Module]]]:
    """The roles whose module is none of the plain kind, with its name and that kind."""
    found = ends(model)
    kinds = (("head", found.head, nn.Linear), ("embed", found.embed, nn.Embedding))
    return [(role, name, kind) for role, name, kind in kinds if not _plain(model, name, kind)]


def _plain(model: nn.Module, name: str | None, kind: type[nn.Module]) -> bool:
    """Whether a module is an embedding, perhaps of the model's own class, or else exactly a plain product."""
    module = None if name is None else model.get_submodule(name)
    return isinstance(module, nn.Embedding) if kind is nn.Embedding else type(module) is kind


def _refuse_other(model: nn.Module, role: str, name: str | None, kind: type[nn.Module]) -> None:
    there = "nothing" if name is None else type(model.get_submodule(name)).__name__
    raise ConfigError(
        f"{type(model).__name__} has {there} for its {role} and no plain {kind.__name__}, so neither end of it can be"
        " quantized: set quant.embed=null quant.head=null"
    )


def _refuse_two(quant: QuantConfig) -> None:
    """Refuses two different settings for one tied tensor."""
    if quant.head is not None and quant.head != quant.embed:
        what = "quant.head is set and quant.embed is not" if quant.embed is None else "quant.head is not quant.embed"
        raise ConfigError(
            f"{what}: embedding and head are one tensor in this model, which has the format of quant.embed;"
            f" set {'quant.embed, and ' if quant.embed is None else ''}quant.head=null"
        )


def _refuse_one(found: Ends, quant: QuantConfig) -> None:
    """Refuses settings that would leave one of two separate tensors dense by mistake."""
    names = (("embed", found.embed), ("head", found.head))
    said = {
        role: choice.asks(role, quant) or choice.pattern_of(name or role, quant) is not None for role, name in names
    }
    if len(set(said.values())) == 2 and not quant.partial:
        there, missing = sorted(ROLES, key=lambda role: not said[role])
        raise ConfigError(
            f"quant.{there} is set and quant.{missing} is not: embedding and head are two tensors in this model, and"
            f" one would stay dense; set quant.{missing} too, or quant.partial=true to leave it so on purpose"
        )
