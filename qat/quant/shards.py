"""Weights that learn in shards: each process holds the states of its share of the layers.

A latent weight takes 16 bytes: itself, two moments and its summed gradient. Of several processes each holds these,
with indices and parts, of whole layers alone, which are its own (the optimizer's state and gradients in shards:
"ZeRO", Rajbhandari et al. 2020, arXiv 1910.02054, its second stage). In a step

1. it writes the weights of its own layers, and gets all others' (`exchange`): 16-bit numbers, as the forward pass
   reads them, so that nothing is lost, and while a teacher computes, where one runs beside the student;
2. each gradient goes to the process whose layer it is as soon as a micro-batch's backward pass has left it, while that
   goes on, and is added up there in fp32, to its own and in the order of the others: the same sum whenever it is made
   again. What a process has of its own layers goes straight into that sum;
3. turning gradients into those of parts, correcting them for latent weights and updating concern one layer at a time,
   so that each process does this for its own as if it were alone.

Layers that feed one product, or are one parameter of a model, stay together: a *unit*. A *bucket* has a unit of each
process, next to each other in the model, so that when they are sent all send and all receive. Buckets leave in a fixed
order, from the last to the first, and in place of a gradient that never comes there are zeros. What a matrix gets
several gradients of in a backward pass (embedding and head) is added up in fp32 by every process and sent once a step,
in the compute type, as all gradients are, a piece while the one before is added up.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qat.processes import Ranks, Trade
from qat.quant.linear import Quantized
from qat.quant.weights import Weights, room

OPEN = 2  # buckets that are filled at a time: one with attention, one with MLPs, as they alternate
UNDER_WAY = 1  # buckets on their way at a time, while the next is computed
PIECE = 1 << 26  # numbers of a matrix' summed gradient that are sent at a time
# Bytes of a weight in the process that owns it (latent weight, moments, summed gradient and index), and in every other
# one while it has several gradients
OWNED, SUMMED = 17, 4


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
    held, owners = [0] * count, dict[int, int]()  # bytes by rank
    for n in sorted(range(len(parts)), key=lambda n: -sizes[n]):
        owners[n] = held.index(min(held))
        elsewhere = SUMMED * sizes[n] if parts[n][0].several else 0
        held = [bytes_ + (OWNED * sizes[n] if rank == owners[n] else elsewhere) for rank, bytes_ in enumerate(held)]
    return [[part for n, part in enumerate(parts) if owners[n] == rank] for rank in range(count)]


class Bucket:
    """At most one unit of each process, whose gradients are sent together.

    Attributes:
        units: by rank.
        sizes: numbers in each process' unit, 0 where it has none.
    """

    def __init__(self, count: int) -> None:
        """An empty one for so many processes."""
        self.units: dict[int, list[Quantized]] = {}
        self.sizes = [0] * count

    def put(self, unit: list[Quantized], rank: int) -> None:
        """Takes in a unit of a process that has none here."""
        self.units[rank], self.sizes[rank] = unit, sum(map(room, unit))

    def leaving(self, rank: int) -> list[int]:
        """Numbers that a process sends to each: none to itself."""
        return [0 if other == rank else size for other, size in enumerate(self.sizes)]

    @property
    def layers(self) -> list[Quantized]:
        """Of all units."""
        return [layer for unit in self.units.values() for layer in unit]

    @property
    def gaps(self) -> bool:
        """Whether something lies between weights."""
        return sum(self.sizes) > sum(layer.outputs * layer.inputs for layer in self.layers)


def buckets(parts: list[list[Quantized]], owners: dict[Quantized, int], count: int) -> list[Bucket]:
    """The units of layers with one gradient a pass, from the last to the first, each in the first bucket with room.

    Of the last few alone, so that none waits long for what is far away in the model.
    """
    found: list[Bucket] = []
    for part in reversed(parts):
        rank = owners[part[0]]
        if not part[0].several:
            bucket = next((one for one in found[-OPEN:] if rank not in one.units), None)
            if bucket is None:
                found.append(bucket := Bucket(count))
            bucket.put(part, rank)
    return found


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
        self.ranks, parts = ranks, units(layers)
        if len(parts) < ranks.count:
            raise ValueError(f"{len(parts)} parts of a model for {ranks.count} processes")
        owned = shares(parts, ranks.count)
        self._shares = [[layer for unit in share for layer in unit] for share in owned]
        self.owners = {layer: rank for rank, share in enumerate(self._shares) for layer in share}
        self._buckets = buckets(parts, self.owners, ranks.count)
        self._bucket = {layer: n for n, bucket in enumerate(self._buckets) for layer in bucket.layers}
        super().__init__(list(layers.values()), dtype, latent=True)
        device = self.values.device
        self._sums = torch.zeros(self._share, dtype=torch.float32, device=device)  # gaps between weights stay zero
        self._linked = False
        others = [layer for layer in self._several if layer not in self.own]
        self._whole = {layer: torch.zeros(room(layer), dtype=torch.float32, device=device) for layer in others}
        self._under_way: deque[tuple[int, Trade]] = deque()
        self._arriving: Trade | None = None
        self._passed = 0  # micro-batches of a step
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
        self._linked, self._passed = True, 0

    def clear(self) -> None:
        """Clears the gradients of an earlier step."""
        for leaf in [*self._leaves.values(), *self._stacked.values()]:
            leaf.grad = None
        for layer in self._several:
            self._added_up(layer).zero_()

    def finish(self) -> None:
        """Sends what is left of a micro-batch, zeros where no gradient came."""
        for n in range(self._next, len(self._buckets)):
            for layer in self._missing[n]:
                whole, origin = self._gathering([layer])
                if not self._adds([layer]):
                    self._cut(whole, [layer], origin).zero_()
            self._send(n)
        self._passed += 1
        self._begin_micro_batch()

    def collect(self) -> None:
        """Adds up what is still under way, and the gradients of matrices that have several."""
        while self._under_way:
            self._add_up(*self._under_way.popleft())
        under_way: deque[tuple[Tensor, Trade]] = deque()
        for layer in self._several:
            for piece in self._added_up(layer).split(PIECE):
                under_way.append((piece, self._send_piece(piece, self.owners[layer])))
                if len(under_way) > UNDER_WAY:
                    _add(*under_way.popleft())
        while under_way:
            _add(*under_way.popleft())

    def exchange(self) -> None:
        """Begins to get the weights that others have written."""
        self.arrive()  # those of an attempt that was given up
        self._arriving = self.ranks.spread(self.values)

    def arrive(self) -> None:
        """Waits for them."""
        if self._arriving is not None:
            self._arriving.wait()
        self._arriving = None

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
        self._next = 0  # the bucket that is sent next
        self._missing = [set(bucket.layers) for bucket in self._buckets]
        self._waiting: dict[int, Tensor] = {}  # gradients of buckets that are not sent yet

    def _gathering(self, layers: list[Quantized]) -> tuple[Tensor, int]:
        """Memory of a unit in its bucket until it is sent; of a matrix with several gradients, where they add up."""
        first = layers[0]
        if first.several:
            return self._added_up(first), self._starts[first]
        owner = self.owners[first]
        if owner == self.ranks.rank:
            return self.sums, self._origin
        n = self._bucket[first]
        bucket = self._buckets[n]
        begin = sum(bucket.leaving(self.ranks.rank)[:owner])
        return self._leaving(n)[begin : begin + bucket.sizes[owner]], self._starts[bucket.units[owner][0]]

    def _adds(self, layers: list[Quantized]) -> bool:
        """True for own layers after a step's first micro-batch, and where several gradients add up."""
        return layers[0].several or (self._passed > 0 and self.owners[layers[0]] == self.ranks.rank)

    def _leaving(self, n: int) -> Tensor:
        """What this process sends of a bucket: the gradients of others' units."""
        if n not in self._waiting:
            made = self.values.new_zeros if self._buckets[n].gaps else self.values.new_empty
            self._waiting[n] = made(sum(self._buckets[n].leaving(self.ranks.rank)), requires_grad=False)
        return self._waiting[n]

    def _added_up(self, layer: Quantized) -> Tensor:
        """A matrix' gradients, flat, as far as this process has them."""
        if layer in self._whole:
            return self._whole[layer]
        begin = self._starts[layer] - self._origin
        return self.sums[begin : begin + room(layer)]

    def _came(self, layers: list[Quantized]) -> None:
        """Sends all buckets in turn whose gradients have come."""
        if layers[0].several:
            return
        self._missing[self._bucket[layers[0]]].difference_update(layers)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send(self._next)

    def _send(self, n: int) -> None:
        while len(self._under_way) >= UNDER_WAY:
            self._add_up(*self._under_way.popleft())
        self._under_way.append((n, self.ranks.trade(self._leaving(n), self._buckets[n].sizes)))
        del self._waiting[n]
        self._next += 1

    def _add_up(self, n: int, trade: Trade) -> None:
        unit = self._buckets[n].units.get(self.ranks.rank)
        begin = self._starts[unit[0]] - self._origin if unit else 0
        _add(self.sums[begin : begin + self._buckets[n].sizes[self.ranks.rank]], trade)

    def _send_piece(self, piece: Tensor, owner: int) -> Trade:
        """Sends a piece of a matrix' summed gradient to its owner, whose own stays there and is not rounded."""
        sizes = [len(piece) if rank == owner else 0 for rank in range(self.ranks.count)]
        leaving = piece[:0] if owner == self.ranks.rank else piece
        return self.ranks.trade(leaving.to(self.values.dtype), sizes)


def _add(total: Tensor, trade: Trade) -> None:
    """Adds what others had, in their order."""
    for one in trade.wait():
        total.add_(one)


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
