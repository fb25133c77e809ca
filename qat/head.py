"""Logits from a model's last hidden states, and the gradient back to them.

Most models multiply with `lm_head` and stop; others divide, cap, add a bias or mask tokens afterwards. Where
the product is known to be all there is (`Pass.product`) it is taken at once. Else the model's own forward
pass runs with its body replaced by one that gives the hidden states at hand, so that whatever its code does
behind the body is done.

Shapes: P positions, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.forward import body, used
from qat.machine import widened
from qat.quant.embedding import head_matrix
from qat.quant.weights import Weights

IMPOSSIBLE = -1e9  # logit whose probability is 0, but whose product with 0 is no NaN as that of -inf would be

Back = Callable[[Tensor], Tensor]


class OutputHead:
    """The part of a model that turns its last hidden states into logits.

    Attributes:
        weight: [V, D] where the product with it is all; else None.
        vocabulary: tokens V.
        learns: the weight where it learns; its gradient is added up where it lies (`qat.quant.weights`).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, matrix = model, head_matrix(model)
        self.learns = matrix if matrix is not None and matrix.home is not None else None
        self.weight: Tensor | None = output_weight(model) if used(model).product else None
        self.vocabulary = int(model.config.get_text_config().vocab_size) if self.weight is None else len(self.weight)

    @torch.no_grad()
    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Logits [P, V], fp32."""
        return self._own(hidden_PD) if self.weight is None else widened(hidden_PD, self.weight)

    def logits_beside(self, hidden_PD: Tensor, other: "OutputHead") -> Tensor:
        """Logits [P, V] over the vocabulary of a student's head, fp32; what has no row here is impossible."""
        logits_PV, lacking = self.logits(hidden_PD), other.vocabulary - self.vocabulary
        return nn.functional.pad(logits_PV, (0, lacking), value=IMPOSSIBLE) if lacking > 0 else logits_PV

    def differentiable(self, hidden_PD: Tensor) -> tuple[Tensor, Back]:
        """Logits [P, V], fp32, and what turns their gradient [P, V] into one [P, D], in the hidden states' type.

        The logits must not be written to; the gradient is consumed in any floating type. Where the head learns, its
        own is added up as well.
        """
        if self.weight is not None:
            return self.logits(hidden_PD), partial(self._back, hidden_PD, self.weight)
        with torch.enable_grad():
            leaf = hidden_PD.detach().requires_grad_()
            logits = self._own(leaf)
        return logits.detach(), partial(self._back_own, leaf, logits)

    def _back(self, hidden_PD: Tensor, weight_VD: Tensor, grad_PV: Tensor) -> Tensor:
        grad_PV = grad_PV.to(hidden_PD.dtype)
        if (matrix := self.learns) is not None:
            cast(Weights, matrix.home).add([matrix], grad_PV, hidden_PD)
        return grad_PV @ weight_VD

    def _back_own(self, hidden_PD: Tensor, logits_PV: Tensor, grad_PV: Tensor) -> Tensor:
        if (matrix := self.learns) is None:
            return torch.autograd.grad(logits_PV, hidden_PD, grad_PV.float())[0]
        both = [hidden_PD, cast(Tensor, matrix.dense)]
        grad_PD, grad_VD = torch.autograd.grad(logits_PV, both, grad_PV.float())
        cast(Weights, matrix.home).put([matrix], grad_VD)
        return grad_PD

    def _own(self, hidden_PD: Tensor) -> Tensor:
        """By the model's own forward pass; the positions are a row."""
        ids = torch.zeros(1, len(hidden_PD), dtype=torch.long, device=hidden_PD.device)
        with _instead_of_body(self.model, hidden_PD[None]), _wide(self.model):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0].float()


def output_weight(model: PreTrainedModel) -> Tensor | None:
    """The matrix [V, D] that hidden states are multiplied with, if the model has one."""
    if (matrix := head_matrix(model)) is not None:
        return matrix.weight(model.dtype) if matrix.dense is None else matrix.dense
    last: Any = model.get_output_embeddings()
    return getattr(last, "weight", None)


class _States(dict[str, Any]):
    """Hidden states as any body gives them: as a tuple, by key or attribute; all else that a body may give is None."""

    def __init__(self, states_BLD: Tensor) -> None:
        super().__init__(last_hidden_state=states_BLD)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, int | slice) else super().get(key)


@contextmanager
def _instead_of_body(model: PreTrainedModel, states_BLD: Tensor) -> Iterator[None]:
    part: Any = body(model)
    before = vars(part).get("forward")
    part.forward = lambda *_, **__: _States(states_BLD)
    try:
        yield
    finally:
        del part.forward
        if before is not None:
            part.forward = before


@contextmanager
def _wide(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the product with the head is not rounded to 16 bits, nor is what follows it."""
    last: Any = model.get_output_embeddings()
    known = type(last) is nn.Linear or head_matrix(model) is not None
    if not known or model.dtype == torch.float32:
        yield
        return
    weight, bias = cast(Tensor, output_weight(model)), last.bias

    def forward(hidden: Tensor) -> Tensor:
        logits: Tensor = _Wide.apply(hidden, weight)
        return logits if bias is None else logits + bias

    vars(last)["forward"] = forward
    try:
        yield
    finally:
        del vars(last)["forward"]


class _Wide(torch.autograd.Function):
    """`hidden · weightᵀ` in fp32 of 16-bit numbers."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight_VD)
        return widened(hidden.flatten(0, -2), weight_VD).unflatten(0, hidden.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight_VD = ctx.saved_tensors
        grad = grads[0].to(hidden.dtype)
        learns = grad.flatten(0, -2).mT @ hidden.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad @ weight_VD, learns
