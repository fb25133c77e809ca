"""Second moments of layer inputs: how much an error in each direction of a weight matters.

`H = Σ x xᵀ / tokens` over calibration text, in full fp32 (TF32 here ruins the fit that follows).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.console import progress
from qat.errors import NumericsError
from qat.machine import exact_matmul


def second_moments(model: PreTrainedModel, names: list[str], rows: Tensor, micro_batch: int) -> dict[str, Tensor]:
    """H [I, I] fp32 of the input of each named linear layer, over token ids `rows` [N, L].

    Raises:
        NumericsError: an input is NaN or infinite.
    """
    moments: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(_gather(moments, name, rows.numel())) for name in names
    ]
    try:
        with (
            torch.no_grad(),
            exact_matmul(),
            progress("layer inputs", rows.numel(), "tokens") as advance,
        ):
            for batch in rows.split(micro_batch):
                model.base_model(batch.to(model.device))
                advance(batch.numel())
    finally:
        for hook in hooks:
            hook.remove()
    for name, moment in moments.items():
        if not torch.isfinite(moment).all():
            raise NumericsError(f"the input of {name} holds NaN or infinity: try instance.precision=fp32")
    return moments


def _gather(moments: dict[str, Tensor], name: str, tokens: int):  # type: ignore[no-untyped-def]
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2).float()
        if name not in moments:
            moments[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        moments[name].addmm_(x.mT, x, alpha=1 / tokens)

    return hook
