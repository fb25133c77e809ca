"""Runs a text through a model layer by layer: a decoder layer processes all of it before the next one begins.

So a layer's own figures (moments of what flows through it) are complete before the next layer's need memory, and
weights that lie in files (`qat.models.streamed`) are read once for the whole text. It holds for models in which hidden
states alone pass from layer to layer, which `flows` finds out.

Shapes: B rows, L positions, D hidden.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat import system
from qat.forward import decoder_layers, run_body, trying

PROBE = 12  # tokens of a row: enough to check that the layers run one after another
# Largest difference allowed between hidden states, relative to their norm
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 2e-3}
KEPT_BYTES = 7e8  # of hidden states: on the device, and as many again in host memory beside a GPU; the rest in a file

Inputs = dict[str, Tensor]  # arguments of a forward pass, `qat.rows.inputs`


class Flow:
    """Hidden states of a text in micro-batches, between two decoder layers; at first before the lowest one.

    Attributes:
        layers: the decoder layers.
        text: the arguments of a forward pass for each micro-batch.
    """

    def __init__(self, model: nn.Module, text: list[Inputs], scratch: Path | None = None) -> None:
        """Runs what comes before the decoder layers.

        Args:
            model: of transformers.
            text: arguments of a forward pass for each micro-batch.
            scratch: a folder for a file of hidden states that are too large for memory; None is the system's.
        """
        self.model, self.text, self.layers = model, text, decoder_layers(model)
        self.store = Store(scratch)
        self._device = next(model.parameters()).device
        self._arguments: list[list[dict[str, Any]]] = []  # arguments of each decoder layer, by micro-batch
        for n, inputs in enumerate(text):
            entered: list[tuple[Tensor, dict[str, Any]]] = []

            def enter(states_BLD: Tensor, to: Any = entered, **arguments: Any) -> Tensor:
                to.append((states_BLD, arguments))
                return states_BLD

            self._run(inputs, enter)
            self.store.put(n, entered[0][0])
            self._arguments.append([arguments for _, arguments in entered])

    def states(self, n: int) -> Tensor:
        """The states [B, L, D] of micro-batch n, on the model's device."""
        return self.store.get(n).to(self._device)

    def through(self, depth: int, states_BLD: Tensor, n: int) -> Tensor:
        """The output of decoder layer `depth` for states [B, L, D] of micro-batch n."""
        states: Tensor = self.layers[depth](states_BLD, **self._arguments[n][depth])
        return states

    def advance(self, depth: int, keep: bool = False) -> None:
        """Passes all states through decoder layer `depth`; with `keep` those before it can be had of `before`."""
        for n in range(len(self.text)):
            states = self.states(n)
            if keep:
                self.store.move(n, (depth, n))
            self.store.put(n, self.through(depth, states, n))

    def before(self, depth: int, n: int) -> Tensor:
        """The kept states [B, L, D] of micro-batch n before decoder layer `depth`, which are then forgotten."""
        states = self.store.get((depth, n)).to(self._device)
        self.store.drop((depth, n))
        return states

    def last(self, n: int, states_BLD: Tensor | None = None) -> Tensor:
        """The final norm's output for states [B, L, D] of micro-batch n, or for those that it has now."""
        states = self.states(n) if states_BLD is None else states_BLD
        return self._run(self.text[n], lambda *_, **__: states)

    def entering(self, n: int) -> Tensor:
        """States [B, L, D] of micro-batch n before the lowest decoder layer, computed anew."""
        entered: list[Tensor] = []

        def enter(states_BLD: Tensor, **_: Any) -> Tensor:
            entered.append(states_BLD)
            return states_BLD

        self._run(self.text[n], enter)
        return entered[0]

    def _run(self, inputs: Inputs, instead: Callable[..., Tensor]) -> Tensor:
        with _in_place_of(self.layers, instead):
            return run_body(self.model, {name: value.to(self._device) for name, value in inputs.items()})


def through_all(model: nn.Module, text: list[Inputs], scratch: Path | None = None) -> Iterator[Tensor]:
    """Last hidden states [B, L, D] of each micro-batch, every decoder layer taking the whole text before the next."""
    flow = Flow(model, text, scratch)
    for depth in range(len(flow.layers)):
        flow.advance(depth)
    for n in range(len(text)):
        yield flow.last(n)
        flow.store.drop(n)


def flows(model: nn.Module, inputs: Inputs) -> bool:
    """Whether running layer after layer gives the same as the model, tested on the beginning of the first row."""
    probe = {name: value[:1, :PROBE].to(next(model.parameters()).device) for name, value in inputs.items()}
    return same_by_layers(model, probe, run_body(model, probe))


def same_by_layers(model: nn.Module, inputs: Inputs, wanted: Tensor) -> bool:
    """Whether running layer after layer gives the wanted hidden states [B, L, D]."""
    with trying():
        (given,) = through_all(model, [inputs])
        return bool((given - wanted).norm() <= ROUNDING.get(given.dtype, 1e-4) * wanted.norm())
    return False


@contextmanager
def _in_place_of(layers: list[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    for layer in layers:
        vars(layer)["forward"] = forward
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


class Store:
    """Tensors by key: where they are while there is room, else in host memory, and beyond that in a file."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._tensors = folder, dict[Hashable, Tensor]()
        self._used: dict[str, int] = defaultdict(int)  # bytes by kind of device
        self._file: system.Positioned | None = None
        self._end = 0
        self._filed: dict[Hashable, tuple[int, torch.dtype, torch.Size]] = {}
        self._free: dict[int, list[int]] = defaultdict(list)  # places in the file that are free, by size

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keeps a tensor in place of the one that the key had."""
        self.drop(key)
        for kind in dict.fromkeys((tensor.device.type, "cpu")):
            if self._used[kind] + tensor.nbytes <= KEPT_BYTES:
                self._tensors[key] = tensor if tensor.device.type == kind else tensor.cpu()
                self._used[kind] += tensor.nbytes
                return
        self._write(key, tensor)

    def get(self, key: Hashable) -> Tensor:
        """The tensor, wherever it is kept."""
        if key in self._tensors:
            return self._tensors[key]
        place, dtype, shape = self._filed[key]
        assert self._file is not None
        content = bytearray(shape.numel() * dtype.itemsize)
        if self._file.read_into(content, place) != len(content):
            raise OSError(f"a file of hidden states lost its end at byte {place}")
        return torch.frombuffer(content, dtype=dtype).view(shape)

    def move(self, key: Hashable, to: Hashable) -> None:
        """Gives a tensor another key."""
        for kept in (self._tensors, self._filed):
            if key in kept:
                kept[to] = kept.pop(key)  # type: ignore[assignment]

    def drop(self, key: Hashable) -> None:
        """Forgets a tensor, if there is one."""
        if (tensor := self._tensors.pop(key, None)) is not None:
            self._used[tensor.device.type] -= tensor.nbytes
        if (filed := self._filed.pop(key, None)) is not None:
            self._free[filed[2].numel() * filed[1].itemsize].append(filed[0])

    def _write(self, key: Hashable, tensor: Tensor) -> None:
        if self._file is None:
            # Closed, and so removed, when the store is forgotten.
            self._file = system.Positioned(tempfile.TemporaryFile(dir=self._folder, buffering=0))  # noqa: SIM115
        if self._free[tensor.nbytes]:
            place = self._free[tensor.nbytes].pop()
        else:
            place, self._end = self._end, self._end + tensor.nbytes
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, place)
        self._filed[key] = place, tensor.dtype, tensor.shape
