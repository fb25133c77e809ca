"""The quantized embedding, and the head that is tied to it: one set of parts, rows for tokens and logits of states.

Models do more with an embedding than look rows up (they scale, or place, what they found), and their own class says
what. So that class keeps its job: it is given the rows as if they were its whole matrix.

Shapes: V tokens, D hidden, X rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qat.quant.formats import Format
from qat.quant.linear import QuantHead, Quantized, QuantLinear, quantized

if TYPE_CHECKING:  # packed exports are registered while transformers is imported
    from transformers import PreTrainedModel


class QuantEmbedding(Quantized):
    """An embedding whose rows are in a format of few bits.

    Attributes:
        plain: the module that it replaces, without a weight: what it does with rows.
        like: empty, in the type of rows; transformers takes the type of a model's first parameter for the model's.
    """

    several = True  # where the head is tied, by its product in chunks of positions

    def __init__(self, format: Format, outputs: int, inputs: int) -> None:
        """Makes room: indices and parts are zero."""
        super().__init__(format, outputs, inputs)
        self.plain: nn.Module = nn.Identity()
        parts = dict(self._parameters)
        self._parameters.clear()
        self.like = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)
        self._parameters.update(parts)

    def take_over(self, old: nn.Module) -> None:
        """What the class does, and the type of its rows."""
        if isinstance(old, QuantEmbedding):
            self.plain, self.like = old.plain, old.like
            return
        self.like = nn.Parameter(cast(Tensor, old.weight).new_empty(0), requires_grad=False)
        self.plain = without_weight(old)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [...] to what the model makes of their rows, [..., D]."""
        if self.dense is not None:
            return through(self.plain, self.dense, input_ids)
        return through(self.plain, self.rows(input_ids.flatten()), each(input_ids))

    @torch.no_grad()
    def rows(self, ids_X: Tensor) -> Tensor:
        """Rows [X, D] of W."""
        operands, rowwise = self.format.operands(self.parts()), self.format.rowwise
        chosen = {name: value[ids_X] if name in rowwise else value for name, value in operands.items()}
        return self.format.grid(chosen).at(self.indices[ids_X]).to(self.like.dtype)


class TiedHead(nn.Module):
    """The product with a quantized embedding, which stays the embedding's: nothing of it is registered here."""

    def __init__(self, embedding: QuantEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self._embedding, self.bias = (embedding,), bias

    @property
    def embedding(self) -> QuantEmbedding:
        """Whose matrix it is."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to logits [..., V], in the type of x."""
        matrix = self.embedding
        weight = matrix.weight(x.dtype) if matrix.dense is None else matrix.dense
        return nn.functional.linear(x, weight, self.bias)


@dataclass(frozen=True)
class Ends:
    """The modules at either end of a model, by their names in it; None where it has none that is its own module.

    Attributes:
        tied: both have one tensor.
    """

    embed: str | None
    head: str | None
    tied: bool


def ends(model: nn.Module) -> Ends:
    """Those of a model of transformers."""
    if not hasattr(model, "get_input_embeddings"):
        return Ends(None, None, False)
    made: Any = model
    embedding, head = made.get_input_embeddings(), made.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    one = vars(embedding).get("_parameters", {}).get("weight") if embedding is not None else None
    tied = isinstance(head, TiedHead) or (one is not None and getattr(head, "weight", None) is one)
    return Ends(names.get(id(embedding)), names.get(id(head)), tied)


def through(embedding: nn.Module, rows_XD: Tensor, ids: Tensor) -> Tensor:
    """What an embedding's own code makes of tokens [...] if these rows were its whole matrix."""
    padding, plain = embedding.padding_idx, cast(Any, embedding)
    plain.padding_idx = None  # a row of the matrix, which only its gradient is held back from
    try:
        return cast(Tensor, functional_call(embedding, {"weight": rows_XD}, (ids,)))
    finally:
        plain.padding_idx = padding


def rows_of(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """The rows [X, D] that tokens [...] have in a model's embedding, quantized or not."""
    embedding: Any = model.get_input_embeddings()
    if isinstance(embedding, QuantEmbedding):
        return embedding.rows(ids.flatten()) if embedding.dense is None else embedding.dense[ids.flatten()]
    return cast(Tensor, embedding.weight.detach()[ids.flatten()])


def own_code(model: "PreTrainedModel") -> nn.Module:
    """The module that says what a model does with rows of its embedding."""
    embedding: Any = model.get_input_embeddings()
    return embedding.plain if isinstance(embedding, QuantEmbedding) else cast(nn.Module, embedding)


def head_matrix(model: "PreTrainedModel") -> Quantized | None:
    """The quantized matrix that hidden states are multiplied with, if it is one."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, TiedHead):
        return head.embedding
    return head if isinstance(head, QuantLinear) else None


@contextmanager
def with_rows(model: "PreTrainedModel", rows_XD: Tensor) -> Iterator[None]:
    """Inside, the embedding takes these for the rows of the tokens it is given, one after the other."""
    embedding, plain = model.get_input_embeddings(), own_code(model)

    def forward(input_ids: Tensor) -> Tensor:
        del vars(embedding)["forward"]  # which may be that of `plain`
        try:
            return through(plain, rows_XD, each(input_ids))
        finally:
            vars(embedding)["forward"] = forward

    vars(embedding)["forward"] = forward
    try:
        yield
    finally:
        del vars(embedding)["forward"]


def without_weight(embedding: nn.Module) -> nn.Module:
    """The module with nothing but what its class does, and buffers; its weight has no rows and is no parameter."""
    none, plain = cast(Tensor, embedding.weight).detach().new_empty(0, 1), cast(Any, embedding)
    del plain.weight
    plain.weight, plain.padding_idx = none, None
    return embedding


def empty(layer: Any) -> Quantized:
    """Room for a layer (`architectures.Layer`), as the module that its role asks for."""
    kinds: dict[str, type[Quantized]] = {"embed": QuantEmbedding, "head": QuantHead}
    return kinds.get(layer.role, QuantLinear)(layer.format, *layer.shape)


def put(model: nn.Module, name: str, made: Quantized) -> None:
    """Puts a quantized matrix in the place of a module of the model's, with what that one does besides."""
    old = model.get_submodule(name)
    if isinstance(made, QuantEmbedding):
        _tie(model, name, made)
    made.take_over(old)
    model.set_submodule(name, made.to(next(model.parameters()).device))


def _tie(model: nn.Module, name: str, made: QuantEmbedding) -> None:
    """The head's product with the embedding's matrix, where it is tied to the embedding that goes."""
    found = ends(model)
    if found.tied and found.embed == name and found.head is not None:
        bias = cast(Tensor | None, model.get_submodule(found.head).bias)
        model.set_submodule(found.head, TiedHead(made, bias))


@torch.no_grad()
def restore(model: "PreTrainedModel") -> None:
    """Embedding and head as they were, with the weights that they stand for: for who knows no others."""
    found, head = ends(model), head_matrix(model)
    for name, matrix in quantized(model).items():
        if name == found.embed and isinstance(matrix, QuantEmbedding):
            plain: Any = matrix.plain
            del plain.weight
            plain.weight = nn.Parameter(matrix.weight(matrix.like.dtype), requires_grad=False)
            model.set_submodule(name, plain)
    if head is None or found.head is None:
        return
    embedding: Any = model.get_input_embeddings()
    made = nn.Linear(head.inputs, head.outputs, bias=False, device="meta")
    made.bias = cast(Any, model.get_output_embeddings()).bias
    tied = isinstance(head, QuantEmbedding)
    made.weight = embedding.weight if tied else nn.Parameter(head.weight(embedding.weight.dtype), requires_grad=False)
    model.set_submodule(found.head, made)


def each(ids: Tensor) -> Tensor:
    """The places of tokens [...] among rows that are theirs one by one."""
    return torch.arange(ids.numel(), device=ids.device).view(ids.shape)
