"""Bits where they are worth most: layers of one student in different formats, chosen by the curvature of the loss.

    python benchmarks/budget.py convert --model <folder> --cache <cache artifact> --output <folder> \
        --sizes 56:12.3 66:15.8
    python benchmarks/budget.py train <embedding file> +experiment=record_… stage=distill checkpoint=<folder>/56 …

`convert` fits every layer in every format of `FORMATS` (bits and rank), each alone, under the moments of the exact
model. An error E in a layer costs ½ tr(G E H Eᵀ) nats. For each size the sum of these costs is made as small as it
can be by a Lagrange multiplier on bytes; the embedding and the rest have a given number of megabytes. Since training
takes more from a layer of two bits than from one of four, each format's cost is multiplied by what training left of
it in the records (`LEFT`). The chosen student then takes the second pass of `convert=thorough` as a whole.

`train` is `embedding.py train` with latent weights at a rate for their bits.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import embedding
import torch

from qat import checkpoints, machine
from qat.artifacts import publish, write_json
from qat.cache.batch import Batch
from qat.config import (
    ConvertConfig,
    InstanceConfig,
    KMeansBackend,
    KMeansConfig,
    ModelConfig,
    ModelSource,
    QuantConfig,
    WeightConfig,
)
from qat.convert.convert import Converted, install, quantize
from qat.convert.moments import Moments, gather
from qat.distill.parameters import Parameter
from qat.models import ModelFolder, linear, locate
from qat.quant.architectures import Layer, select
from qat.quant.formats import Codebook
from qat.quant.linear import QuantLinear

FORMATS = tuple(Codebook(*one) for one in ((2, 4), (2, 8), (2, 16), (3, 4), (3, 8), (4, 4), (4, 8), (5, 4), (6, 4)))
LEFT = {2: 0.31, 3: 0.45, 4: 0.48, 5: 0.5, 6: 0.5}  # trained KL over converted KL of the records of so many bits
RATES = {2: 10.0, 3: 4.0, 4: 1.75, 5: 0.9, 6: 0.45}  # of latent weights, in thousandths: as the step of a codebook
MEGA = 1e6


def main() -> None:
    """One of two commands."""
    if sys.argv[1:2] == ["train"]:
        sys.exit(train(Path(sys.argv[2]), sys.argv[3:]))
    convert(arguments())


def convert(options: argparse.Namespace) -> None:
    """Fits all formats, chooses for each size and writes its checkpoint and its choice."""
    place = machine.resolve(InstanceConfig(name="auto"))
    folder = locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), Path())
    text, exact = embedding.calibration(Path(options.cache)), folder.load(torch.float32, torch.device("cpu"))
    settings = ConvertConfig(name="thorough", gradients=True, sweeps=2)
    kmeans = KMeansConfig(name="exact", backend=KMeansBackend.exact)

    def weights(name: str) -> torch.Tensor:
        return linear(exact, name).weight

    began = time.monotonic()
    model = folder.load(place.dtype, place.device)
    layers = select(model, QuantConfig(name="any", mlp=WeightConfig(bits=4, rank=4), attn=WeightConfig(bits=4, rank=4)))
    moments = gather(model, layers, text, gradients=True)
    del model
    print(f"moments: {time.monotonic() - began:.1f} s", flush=True)
    fitted: dict[Codebook, dict[str, Converted]] = {}
    costs: dict[Codebook, dict[str, float]] = {}
    for choice in FORMATS:
        began = time.monotonic()
        members = [replace(layer, format=choice) for layer in layers]
        made = quantize(members, weights, moments, settings, kmeans, place.device)
        fitted[choice] = {one.layer.name: one for one in made}
        costs[choice] = {one.layer.name: cost(one, weights(one.layer.name), moments, place.device) for one in made}
        print(
            f"{named(choice)}: {size(one.layer for one in made):.2f} MB, {sum(costs[choice].values()):.4f} nats,"
            f" {time.monotonic() - began:.1f} s",
            flush=True,
        )
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "costs.json", {named(choice): of for choice, of in costs.items()})
    for given in options.sizes:
        whole, of_embedding = given.split(":")
        best = chosen(layers, costs, float(whole) - float(of_embedding) - options.rest)
        made = [fitted[best[layer.name]][layer.name] for layer in layers]
        print(f"{given}: {told(made, costs)}", flush=True)
        finish(folder, made, text, weights, settings, kmeans, place, output / whole)


def cost(one: Converted, weight: torch.Tensor, moments: Moments, device: torch.device) -> float:
    """½ tr(G E H Eᵀ), in nats a token."""
    H = moments.inputs[one.layer.source].to(device, torch.float32)
    G = moments.outputs[one.layer.name].to(device, torch.float32)
    with machine.exact_matmul(), torch.no_grad():
        error = one.module.to(device).weight(torch.float32) - weight.to(device, torch.float32)
        one.module.cpu()
        return float(((G @ error @ H) * error).sum() / 2)


def chosen(layers: list[Layer], costs: dict[Codebook, dict[str, float]], megabytes: float) -> dict[str, Codebook]:
    """A format for each layer: the least cost of at most so many megabytes."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low * high) ** 0.5 if low else high / 1e6
        best = {layer.name: cheapest(layer, costs, middle) for layer in layers}
        used = size(replace(layer, format=best[layer.name]) for layer in layers)
        low, high = (middle, high) if used > megabytes else (low, middle)
    return {layer.name: cheapest(layer, costs, high) for layer in layers}


def cheapest(layer: Layer, costs: dict[Codebook, dict[str, float]], price: float) -> Codebook:
    """What is best for a layer where a megabyte costs so much."""

    def total(choice: Codebook) -> float:
        paid = price * size([replace(layer, format=choice)])
        return LEFT[choice.bits] * costs[choice][layer.name] + paid

    return min(costs, key=total)


def size(layers: Iterable[Layer]) -> float:
    """Megabytes of indices, scales and codebooks."""
    return sum(layer.weights * layer.bits_per_weight / 8 for layer in layers) / MEGA


def told(made: list[Converted], costs: dict[Codebook, dict[str, float]]) -> str:
    """Size, cost, and how many layers have which format, by projection."""
    layers = [one.layer for one in made]
    total = sum(costs[codebook_of(layer)][layer.name] for layer in layers)
    counts: dict[str, dict[str, int]] = {}
    for layer in layers:
        of = counts.setdefault(layer.name.rpartition(".")[2], {})
        of[named(codebook_of(layer))] = of.get(named(codebook_of(layer)), 0) + 1
    return f"{size(layers):.2f} MB, {total:.4f} nats, {json.dumps(counts)}"


def codebook_of(layer: Layer) -> Codebook:
    """A layer's format, which is one of `FORMATS`."""
    return next(format for format in FORMATS if format == layer.format)


def named(format: Codebook) -> str:
    """`2r8` for two bits and rank 8."""
    return f"{format.bits}r{format.rank}"


def finish(
    folder: ModelFolder,
    made: list[Converted],
    text: list[Batch],
    weights: Callable[[str], torch.Tensor],
    settings: ConvertConfig,
    kmeans: KMeansConfig,
    place: machine.Machine,
    output: Path,
) -> None:
    """The second pass over the chosen student, and its checkpoint."""
    model, layers = folder.load(place.dtype, place.device), [one.layer for one in made]
    install(model, {one.layer.name: one.module for one in made})
    moments = gather(model, layers, text, gradients=True)
    del model
    for one in made:
        one.module.cpu()
    done = quantize(layers, weights, moments, settings, kmeans, place.device, made)
    modules = {one.layer.name: one.module for one in done}
    preset = QuantConfig(name="q2a4_r8", mlp=WeightConfig(bits=2, rank=8), attn=WeightConfig(bits=4, rank=8))
    with publish(output, checkpoints.describe(folder, preset, layers)) as (scratch, _):
        checkpoints.write_layers(modules, scratch)


def train(path: Path, words: list[str]) -> int:
    """A run in which the embedding learns too, and latent weights learn at a rate for their bits."""
    rate = next(float(word.partition("=")[2]) for word in words if word.startswith("train.lr=")) * 1000
    of_kind = embedding.WithEmbedding._of
    start = embedding.WithEmbedding.__init__

    def begin(self, student, layers, learn, *rest):  # type: ignore[no-untyped-def]
        for bits, wanted in RATES.items():
            setattr(learn, f"latent{bits}", wanted / rate)
        learn.latent = max(RATES[layer.format.bits] for layer in layers.values()) / rate
        start(self, student, layers, learn, *rest)

    def by_bits(self, kind: str, layers: dict[str, QuantLinear]) -> list[Parameter]:  # type: ignore[no-untyped-def]
        found = of_kind(self, kind, layers)
        bits = {f"{name}.latent": layer.format.bits for name, layer in layers.items()}
        return [replace(p, kind=f"latent{bits[p.name]}") if p.kind == "latent" else p for p in found]

    os.environ["QAT_EMBEDDING_RATE"] = str(RATES[embedding.parse(path.stem).bits] / rate)
    owner = embedding.WithEmbedding
    with patch.object(owner, "_of", by_bits), patch.object(owner, "__init__", begin):
        return embedding.train(path, words)


def arguments() -> argparse.Namespace:
    """The command line of `convert`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["convert"], help="or train, with a command line of launch.py")
    parser.add_argument("--model", required=True, help="folder of the teacher")
    parser.add_argument("--cache", required=True, help="a cache artifact")
    parser.add_argument("--output", required=True)
    parser.add_argument("--sizes", nargs="+", required=True, help="megabytes of the whole file, and of its embedding")
    parser.add_argument("--rest", type=float, default=0.2, help="megabytes of norms and metadata")
    return parser.parse_args()


if __name__ == "__main__":
    main()
