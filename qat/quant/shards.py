"""Weights that learn in shards: each process holds the states of its share of the layers.

A latent weight takes 16 bytes: itself, two moments and its summed gradient. Of several processes each holds these,
with indices and parts, of whole layers alone, which are its own (the optimizer's state and gradients in shards:
"ZeRO", Rajbhandari et al. 2020, arXiv 1910.02054, its second stage). In a step

1. it writes the weights of its own layers, and gets all others' (`exchange`): 16-bit numbers, as the forward pass
   reads them, so that nothing is lost;
2. each gradient goes to the process whose layer it is as soon as a micro-batch's backward pass has left it, while that
   goes on, and is added up there in fp32, in the order of the processes: the same sum whenever it is made again;
3. turning gradients into those of parts, correcting them for latent weights and updating concern one layer at a time,
   so that each process does this for its own as if it were alone.

Layers that feed one product, or are one parameter of a model, stay together: a *unit*. Units are sent in a fixed order,
from the last to the first, so that all processes send the same one; where a gradient never comes, zeros are sent. What
a matrix gets several gradients of in a backward pass (embedding and head) is added up in fp32 by every process, and
sent once a step.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qat.processes import Gathering, Ranks
from qat.quant.linear import Quantized
from qat.quant.weights import Weights, room

UNDER_WAY = 2  # units whose gradients are on their way at a time: one is sent while the next is computed
PIECE = 1 << 26  # numbers of a matrix' summed gradient that are sent at a time


def units(layers: dict[str, Quantized]) -> list[list[Quantized]]:
    """Layers that stay together, in order: those of one module, and experts of one stack."""
    found: dict[object, list[Quantized]] = {}
    for name, layer in layers.items():
        module = name if layer.several else name.rpartition(".")[0] or name
        found.setdefault(layer.stack or module, []).append(layer)
    return list(found.values())


def shares(parts: list[list[Quantized]], count: int) -> list[list[list[Quantized]]]:
    """The units that each of `count` processes owns: the largest that is left to whoever has least, each in order."""
    sizes = [sum(map(room, part)) for part in parts]
    held, owners = [0] * count, dict[int, int]()
    for n in sorted(range(len(parts)), key=lambda n: -sizes[n]):
        owners[n] = held.index(min(held))
        held[owners[n]] += sizes[n]
    return [[part for n, part in enumerate(parts) if owners[n] == rank] for rank in range(count)]


class SharedWeights(Weights):
    """Weights of which each process owns some: it writes these, and sums up their gradients in fp32.

    Of all other layers indices, parts and latent weights are given up: they are tensors without memory (`meta`) that
    tell shapes and types.

    Attributes:
        owners: the rank that has each layer.
    """

    def __init__(self, layers: dict[str, Quantized], dtype: torch.dtype, ranks: Ranks) -> None:
        """Allocates memory, and gives up what others own.

        Args:
            layers: by name, with latent weights, whole in every process.
            dtype: compute type.
            ranks: the processes that share them.

        Raises:
            ValueError: there are fewer units than processes.
        """
        self.ranks, self._units = ranks, units(layers)
        if len(self._units) < ranks.count:
            raise ValueError(f"{len(self._units)} parts of a model for {ranks.count} processes")
        owned = shares(self._units, ranks.count)
        self._shares = [[layer for unit in share for layer in unit] for share in owned]
        self.owners = {layer: rank for rank, share in enumerate(self._shares) for layer in share}
        self._unit = {layer: n for n, unit in enumerate(self._units) for layer in unit}
        super().__init__(list(layers.values()), dtype, latent=True)
        device = self.values.device
        self._sums = torch.zeros(self._share, dtype=torch.float32, device=device)  # gaps between weights stay zero
        self._linked = False
        others = [layer for layer in self._several if layer not in self.own]
        self._whole = {layer: torch.zeros(room(layer), dtype=torch.float32, device=device) for layer in others}
        self._order = [n for n, unit in reversed(list(enumerate(self._units))) if not unit[0].several]
        self._under_way: deque[tuple[int, Gathering]] = deque()
        self._begin_micro_batch()

    def _arrange(self) -> tuple[list[Quantized], int]:
        """Side by side what each process owns, filled up to the same length."""
        self._share = max(sum(map(room, share)) for share in self._shares)
        for rank, share in enumerate(self._shares):
            self._lay(share, rank * self._share)
            if rank != self.ranks.rank:
                for layer in share:
                    _give_up(layer)
        return self._shares[self.ranks.rank], self.ranks.count * self._share

    @property
    def written(self) -> Tensor:
        """This process' share of `values`."""
        return self.values[self._origin : self._origin + self._share]

    @property
    def _origin(self) -> int:
        return self.ranks.rank * self._share

    def begin(self, micro_batches: int) -> None:
        """Gives latent weights their gradients, once; any number of micro-batches is added up in the same way."""
        for layer in self.own if not self._linked else ():
            layer.latent.grad = self.sum(layer)  # type: ignore[union-attr]  # straight through
        self._linked = True

    def clear(self) -> None:
        """Clears the gradients of an earlier step."""
        for leaf in [*self._leaves.values(), *self._stacked.values()]:
            leaf.grad = None
        for sums in [self.sums, *self._whole.values()]:
            sums.zero_()

    def finish(self) -> None:
        """Sends what is left of a micro-batch, zeros where no gradient came."""
        for n in self._order[self._next :]:
            whole, origin = self._gathering(self._units[n])
            for layer in self._missing[n]:
                self._cut(whole, [layer], origin).zero_()
            self._send(n)
        self._begin_micro_batch()

    def collect(self) -> None:
        """Adds up what is still under way, and the gradients of matrices that have several."""
        while self._under_way:
            self._add_up(*self._under_way.popleft())
        for layer in self._several:
            for piece in self._gathering([layer])[0].split(PIECE):
                found = self.ranks.gather(piece, self.owners[layer]).wait()
                for rank, one in enumerate(found):
                    if rank != self.ranks.rank:
                        piece.add_(one)

    def exchange(self) -> None:
        """Gets the weights that others have written."""
        self.ranks.spread(self.values)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the first process has all indices, parts and latent weights, those of others' in host memory."""
        for layer in self.layers:
            found = {name: self.bring(x, self.owners[layer]) for name, x in _held(layer).items() if self.owners[layer]}
            if self.ranks.first:
                _replace(layer, found)
        try:
            yield
        finally:
            for layer in self.layers:
                if self.ranks.first and self.owners[layer]:
                    _give_up(layer)

    def bring(self, tensor: Tensor, owner: int) -> Tensor:
        """What `owner` has; see `Ranks.bring`."""
        return self.ranks.bring(tensor, owner, self.values.device)

    def _begin_micro_batch(self) -> None:
        self._next = 0  # in `_order`: the unit that is sent next
        self._missing = [set(unit) for unit in self._units]
        self._waiting: dict[int, Tensor] = {}  # gradients of units that are not sent yet

    def _gathering(self, layers: list[Quantized]) -> tuple[Tensor, int]:
        """Memory of a unit until it is sent; of a matrix with several gradients, where they are added up."""
        first = layers[0]
        if first.several:
            start = self._starts[first]
            if first in self._whole:
                return self._whole[first], start
            begin = start - self._origin
            return self.sums[begin : begin + room(first)], start
        n = self._unit[first]
        unit = self._units[n]
        if n not in self._waiting:
            size = sum(map(room, unit))
            gaps = size > sum(layer.outputs * layer.inputs for layer in unit)
            made = self.values.new_zeros if gaps else self.values.new_empty
            self._waiting[n] = made(size, requires_grad=False)
        return self._waiting[n], min(self._starts[layer] for layer in unit)

    def _came(self, layers: list[Quantized]) -> None:
        """Sends all units in turn whose gradients have come."""
        if layers[0].several:
            return
        self._missing[self._unit[layers[0]]].difference_update(layers)
        while self._next < len(self._order) and not self._missing[self._order[self._next]]:
            self._send(self._order[self._next])

    def _send(self, n: int) -> None:
        while len(self._under_way) >= UNDER_WAY:
            self._add_up(*self._under_way.popleft())
        self._under_way.append((n, self.ranks.gather(self._waiting[n], self.owners[self._units[n][0]])))
        del self._waiting[n]
        self._next += 1

    def _add_up(self, n: int, gathering: Gathering) -> None:
        found = gathering.wait()
        begin = min(self._starts[layer] for layer in self._units[n]) - self._origin
        for one in found:
            self.sums[begin : begin + len(one)].add_(one)


def _held(layer: Quantized) -> dict[str, Tensor]:
    """What the owner of a layer has of it."""
    found = {"indices": layer.indices, **layer.parts()}
    return found if layer.latent is None else found | {"latent": layer.latent}


def _replace(layer: Quantized, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        setattr(layer, name, tensor if name == "indices" else nn.Parameter(tensor.detach(), requires_grad=False))


def _give_up(layer: Quantized) -> None:
    """Leaves shapes and types of what others hold."""
    _replace(layer, {name: torch.empty_like(tensor, device="meta") for name, tensor in _held(layer).items()})
    layer.curvature = None
