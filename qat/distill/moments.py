"""AdamW's moments of latent weights in host memory (`instance.moments=host`), for a GPU that is short of its own.

They are 8 of the 19 bytes that a latent weight takes with all that belongs to it, and needed once a step. So they are
read, updated and written back a piece at a time, the next piece on its way in and the last on its way out while one is
updated. ("ZeRO-Offload", Ren et al. 2021, arXiv 2101.06840, keeps them there too, and updates on the host's cores.) The
numbers are those of moments on the GPU, to the last bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from qat.distill.parameters import Parameter

PIECE = 1 << 23  # numbers of a moment that are moved at a time
BUFFERS = 3  # pieces on the GPU: one comes, one is updated, one leaves
STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a tensor


@dataclass(frozen=True)
class Piece:
    """A part of a parameter, flat, and its moments in host memory."""

    part: slice
    moments: tuple[Tensor, Tensor]


class HostMoments:
    """AdamW for parameters on a device whose moments are in host memory."""

    def __init__(
        self,
        parameters: list[tuple[Parameter, Tensor]],
        betas: tuple[float, float],
        eps: float,
        decay: float,
        device: torch.device,
    ) -> None:
        """All moments are zero.

        Args:
            parameters: fp32, contiguous; with the scalar that their rates are read from.
            betas, eps, decay: as of `torch.optim.AdamW`.
            device: where the parameters are.
        """
        self.betas, self.eps, self.decay = betas, eps, decay
        self._parameters = {parameter.name: (parameter, rate) for parameter, rate in parameters}
        self._steps = {name: torch.zeros((), dtype=torch.float32, device=device) for name in self._parameters}
        self._pieces = {one.name: list(_pieces(one.value.numel(), device)) for one, _ in parameters}
        self._lanes = Lanes(device) if device.type == "cuda" else None

    def step(self, divisor: Tensor, skip: Tensor) -> None:
        """One update; `divisor` and `skip` as of `Optimizer.step`."""
        if self._lanes is not None:
            self._lanes.begin()
        for name, (parameter, rate) in self._parameters.items():
            value, grad, count = parameter.value.detach().view(-1), parameter.value.grad, self._steps[name]
            if grad is None:
                raise RuntimeError(f"{name} lost its gradient")
            for piece in self._pieces[name]:
                here = piece.moments if self._lanes is None else self._lanes.load(piece.moments)
                adamw(
                    [value[piece.part]], [grad.view(-1)[piece.part]], [here[0]], [here[1]], [], [count.clone()],
                    fused=True, capturable=self._lanes is not None, grad_scale=divisor, found_inf=skip, amsgrad=False,
                    beta1=self.betas[0], beta2=self.betas[1], lr=rate, weight_decay=self.decay, eps=self.eps,
                    maximize=False,
                )  # fmt: skip
                if self._lanes is not None:
                    self._lanes.store(piece.moments)
            count.add_(1 - skip)

    def state(self, parameter: Parameter) -> dict[str, Tensor]:
        """The step count and copies of the moments of a parameter."""
        if self._lanes is not None:
            self._lanes.wait()
        pieces, shape = self._pieces[parameter.name], parameter.value.shape
        moments = [torch.cat([piece.moments[which] for piece in pieces]).view(shape) for which in (0, 1)]
        return dict(zip(STATE, (self._steps[parameter.name], *moments), strict=True))

    def load(self, parameter: Parameter, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        if self._lanes is not None:
            self._lanes.wait()
        self._steps[parameter.name].copy_(tensors["step"])
        for piece in self._pieces[parameter.name]:
            for moment, name in zip(piece.moments, STATE[1:], strict=True):
                moment.copy_(tensors[name].view(-1)[piece.part])

    def holds(self, parameter: Parameter) -> bool:
        """Whether these are its moments."""
        return parameter.name in self._parameters


@dataclass(frozen=True)
class Slot:
    """Memory on the GPU for a piece, [2, `PIECE`], and what has happened to it."""

    memory: Tensor
    loaded: torch.cuda.Event
    computed: torch.cuda.Event
    left: torch.cuda.Event


class Lanes:
    """Moves pieces of moments between host memory and a GPU beside what it computes, in turn through a few buffers."""

    def __init__(self, device: torch.device) -> None:
        """Allocates the buffers."""
        self.inwards, self.outwards = torch.cuda.Stream(device), torch.cuda.Stream(device)
        memory = [torch.empty(2, PIECE, dtype=torch.float32, device=device) for _ in range(BUFFERS)]
        event = torch.cuda.Event
        self._slots = [Slot(one, event(), event(), event()) for one in memory]
        self._turn = 0

    def begin(self) -> None:
        """What left in the step before is there before it comes back."""
        self.inwards.wait_stream(self.outwards)

    def load(self, moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A piece on the GPU, for what is computed from now on."""
        slot = self._slots[self._turn]
        first, second = slot.memory[:, : len(moments[0])]
        with torch.cuda.stream(self.inwards):
            self.inwards.wait_event(slot.left)
            first.copy_(moments[0], non_blocking=True)
            second.copy_(moments[1], non_blocking=True)
            slot.loaded.record(self.inwards)
        torch.cuda.current_stream().wait_event(slot.loaded)
        return first, second

    def store(self, moments: tuple[Tensor, Tensor]) -> None:
        """Sends the piece that was loaded last back as it is by now."""
        slot = self._slots[self._turn]
        slot.computed.record(torch.cuda.current_stream())
        with torch.cuda.stream(self.outwards):
            self.outwards.wait_event(slot.computed)
            for moment, here in zip(moments, slot.memory, strict=True):
                moment.copy_(here[: len(moment)], non_blocking=True)
            slot.left.record(self.outwards)
        self._turn = (self._turn + 1) % BUFFERS

    def wait(self) -> None:
        """Until all is in host memory."""
        self.outwards.synchronize()


def _pieces(numbers: int, device: torch.device) -> Iterator[Piece]:
    pinned = device.type == "cuda"  # of other memory copies would wait for the host
    for start in range(0, numbers, PIECE):
        part = slice(start, min(numbers, start + PIECE))
        size = part.stop - part.start
        first, second = (torch.zeros(size, dtype=torch.float32, pin_memory=pinned) for _ in range(2))
        yield Piece(part, (first, second))
