"""The quantized embedding and its tied head: one set of parts, used to look up rows and to compute logits.

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

from qat.quant import places
from qat.quant.formats import Format
from qat.quant.linear import QuantHead, Quantized, QuantLinear, quantized

if TYPE_CHECKING:  # not imported at run time: packed exports are registered while transformers is imported
    from transformers import PreTrainedModel


class QuantEmbedding(Quantized):
    """An embedding whose rows are in a format of few bits.

    Attributes:
        plain: the module that it replaces, without a weight: what it does with rows.
        like: empty, in the type of rows; transformers takes the type of a model's first parameter for the model's.
    """

    several = True  # a tied head adds a gradient for each chunk of positions

    def __init__(self, format: Format, outputs: int, inputs: int) -> None:
        """Creates indices and parts, all zero."""
        super().__init__(format, outputs, inputs)
        self.plain: nn.Module = nn.Identity()
        parts = dict(self._parameters)
        self._parameters.clear()
        self.like = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)
        self._parameters.update(parts)

    def take_over(self, old: nn.Module) -> None:
        """Takes over the old module's own code, and the type of its rows."""
        if isinstance(old, QuantEmbedding):
            self.plain, self.like = old.plain, old.like
            return
        self.like = nn.Parameter(cast(Tensor, old.weight).new_empty(0), requires_grad=False)
        self.plain = without_weight(old)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [...] to the model's embeddings [..., D]."""
        if self.dense is not None:
            return through(self.plain, self.dense, input_ids)
        return through(self.plain, self.rows(input_ids.flatten()), each(input_ids))

    @torch.no_grad()
    def rows(self, ids_X: Tensor) -> Tensor:
        """Rows [X, D] of W, in the type of the model's rows."""
        return self._rows(ids_X).to(self.like.dtype)


class TiedHead(nn.Module):
    """The logits' product with a quantized embedding; the matrix is the embedding's and is not registered here."""

    def __init__(self, embedding: QuantEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self._embedding, self.bias = (embedding,), bias

    @property
    def embedding(self) -> QuantEmbedding:
        """The embedding that holds the matrix."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to logits [..., V], in the type of x."""
        matrix = self.embedding
        weight = matrix.weight(x.dtype) if matrix.dense is None else matrix.dense
        return nn.functional.linear(x, weight, self.bias)


@dataclass(frozen=True)
class Ends:
    """Embedding and head of a model with their names in it; None where it has no such separate module.

    Attributes:
        tied: both have one tensor.
    """

    embed: str | None
    head: str | None
    tied: bool


def ends(model: nn.Module) -> Ends:
    """Embedding and head of a transformers model."""
    if not hasattr(model, "get_input_embeddings"):
        return Ends(None, None, False)
    made: Any = model
    embedding, head = made.get_input_embeddings(), made.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    one = vars(embedding).get("_parameters", {}).get("weight") if embedding is not None else None
    tied = isinstance(head, TiedHead) or (one is not None and getattr(head, "weight", None) is one)
    return Ends(names.get(id(embedding)), names.get(id(head)), tied)


def through(embedding: nn.Module, rows_XD: Tensor, ids: Tensor) -> Tensor:
    """The output of an embedding's own code for tokens [...] if these rows were its whole matrix."""
    padding, plain = embedding.padding_idx, cast(Any, embedding)
    plain.padding_idx = None  # only blocks one row's gradient, by its number in the full matrix
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
    """The module with the model's own code for rows of its embedding."""
    embedding: Any = model.get_input_embeddings()
    return embedding.plain if isinstance(embedding, QuantEmbedding) else cast(nn.Module, embedding)


def head_matrix(model: "PreTrainedModel") -> Quantized | None:
    """The quantized matrix of the head; None where it is not quantized."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, TiedHead):
        return head.embedding
    return head if isinstance(head, QuantLinear) else None


@contextmanager
def with_rows(model: "PreTrainedModel", rows_XD: Tensor) -> Iterator[None]:
    """Inside, the embedding uses these rows for its tokens, in their order."""
    embedding, plain = model.get_input_embeddings(), own_code(model)

    def forward(input_ids: Tensor) -> Tensor:
        del vars(embedding)["forward"]  # `embedding` may be the `plain` module of a quantized embedding
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
    """The module with only its code and buffers; its weight has no rows and is not a parameter."""
    none, plain = cast(Tensor, embedding.weight).detach().new_empty(0, 1), cast(Any, embedding)
    del plain.weight
    plain.weight, plain.padding_idx = none, None
    return embedding


def empty(layer: Any) -> Quantized:
    """An empty module for a layer (`architectures.Layer`), of the class for its role."""
    kinds: dict[str, type[Quantized]] = {"embed": QuantEmbedding, "head": QuantHead}
    return kinds.get(layer.role, QuantLinear)(layer.format, *layer.shape)


def put(model: nn.Module, name: str, made: Quantized) -> None:
    """Replaces a module of the model by a quantized matrix, which takes over the old one's bias and other extras."""
    if isinstance(made, QuantLinear):
        made.bias = places.bias(model, name)
    else:
        old = model.get_submodule(name)
        _tie(model, name, made)
        made.take_over(old)
    places.put(model, name, made.to(next(model.parameters()).device))


def _tie(model: nn.Module, name: str, made: Quantized) -> None:
    """Connects a tied head to the matrix of the new embedding."""
    found = ends(model)
    if isinstance(made, QuantEmbedding) and found.tied and found.embed == name and found.head is not None:
        bias = cast(Tensor | None, model.get_submodule(found.head).bias)
        untie(model, name)
        model.set_submodule(found.head, TiedHead(made, bias))


def untie(model: Any, name: str) -> list[str]:
    """Takes what is tied to an embedding off transformers' lists, so that `tie_weights` leaves it alone; the names."""
    gone: list[str] = []
    for place, part in model.named_modules():
        if hasattr(part, "get_expanded_tied_weights_keys"):
            before = f"{place}." if place else ""
            keys: dict[str, str] = part.get_expanded_tied_weights_keys()
            tied = [target for target, source in keys.items() if f"{before}{source}" == f"{name}.weight"]
            if tied:
                part._tied_weights_keys = {target: source for target, source in keys.items() if target not in tied}
                gone += [before + target for target in tied]
    listed: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {target: source for target, source in listed.items() if target not in gone}
    return gone


def _tie_again(model: Any) -> None:
    """Puts back what `untie` took off."""
    for part in model.modules():
        vars(part).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@torch.no_grad()
def restore(model: "PreTrainedModel") -> None:
    """Puts dense modules back for embedding and head, for programs that know no others."""
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
    if tied:
        _tie_again(model)


def each(ids: Tensor) -> Tensor:
    """Positions of tokens [...] in a list that has one row for each token."""
    return torch.arange(ids.numel(), device=ids.device).view(ids.shape)
