"""Codebooks of vectors, and low-rank corrections of the weight, against codebooks of numbers at as many bytes.

    python benchmarks/vectors.py --model <folder> --layers 5 15 25

Every matrix of some decoder layers is converted under the second moment of its inputs on the project's own prompts, as
`convert=fast` does: as `codebook` of the bits and rank asked for; as `vector` with the largest rank that takes no more
bytes; then with a matrix of rank q in fp16 added to the weight, beside a `codebook` with q more ranks of scales, which
takes the same bytes. The matrix is fitted in turn with the codebook, each to what the other leaves (as in "CALDERA",
Saha et al. 2024, arXiv 2405.18886). Prints output errors relative to the output, and seconds.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from conversion import preset
from torch import Tensor

from qat.cache.batch import Text
from qat.config import DataConfig, DataSource, ModelConfig, ModelSource, Packing
from qat.conversion.moments import gather
from qat.data import packing, texts, thinking
from qat.data.documents import Document
from qat.machine import exact_matmul
from qat.models import locate
from qat.quant import kmeans
from qat.quant.architectures import Layer, select
from qat.quant.curvature import Curvature, Factor, damp
from qat.quant.fit import Problem, fit
from qat.quant.formats import Codebook, Format, Vector
from qat.quant.places import matrix


def main() -> None:
    """Converts the layers in every way."""
    options = arguments()
    folder = locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), Path())
    model, tokenizer = folder.load(torch.float32, torch.device("cpu")), folder.tokenizer()
    questions = texts.prompts(DataConfig(name="prompts", source=DataSource.selfgen))
    documents = [Document(q, thinking.chat_tokens(tokenizer, [{"role": "user", "content": q}])) for q in questions]
    rows = packing.pack(documents, 128, Packing.joined, 0).input_ids[: options.tokens // 128].long()
    layers = [layer for layer in select(model, preset("q2a4_r8")) if decoder_layer(layer) in options.layers]
    del model.model.layers[max(options.layers) + 1 :]  # what lies above tells nothing of the inputs below
    moments = gather(model, layers, Text(rows).batches(8))
    print(f"{rows.numel()} tokens, {options.rounds} rounds, {len(layers)} matrices")
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with torch.no_grad(), exact_matmul():
        for layer in layers:
            weight, H = matrix(model, layer.name)[None].float(), moments.inputs[layer.source][None]
            for what, figures in ways(weight, H, options):
                found[what].append(figures)
                print(f"{layer.name}: {what}: {figures[1]:.3f} bits, {figures[0]:.4f}, {figures[2]:.1f} s", flush=True)
    print(f"{'':32}{'bits':>8}{'error':>9}{'relative':>10}{'seconds':>9}")
    first = next(iter(found.values()))
    for what, rows_of in found.items():
        error, bits, seconds = (sum(row[i] for row in rows_of) / len(rows_of) for i in range(3))
        ratio = torch.tensor([row[0] / one[0] for row, one in zip(rows_of, first, strict=True)]).log().mean().exp()
        print(f"{what:32}{bits:8.3f}{error:9.4f}{ratio:10.3f}{seconds:9.1f}")


def ways(
    weight: Tensor, H: Tensor, options: argparse.Namespace
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """What is compared, with the figures of each that `measured` gives."""
    shape, scalar = (weight.shape[1], weight.shape[2]), Codebook(options.bits, options.rank)
    yield f"codebook, rank {scalar.rank}", measured(weight, H, scalar, 0, options)
    yield f"vector of {options.dim}", measured(weight, H, as_large(scalar, options.dim, shape), 0, options)
    for q in options.corrections:
        larger = replace(scalar, rank=scalar.rank + q)
        yield f"codebook, rank {larger.rank}", measured(weight, H, larger, 0, options)
        yield f"codebook, rank {scalar.rank}, + rank {q}", measured(weight, H, scalar, q, options)


def as_large(scalar: Codebook, dim: int, shape: tuple[int, int]) -> Vector:
    """Vectors with the largest rank that takes no more bytes."""
    ranks = range(scalar.rank, 0, -1)
    made = (Vector(scalar.bits, rank, dim) for rank in ranks)
    return next(one for one in made if one.stored_bits(*shape) <= scalar.stored_bits(*shape))


def measured(
    weight: Tensor, H: Tensor, format: Format, correction: int, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Relative output error, bits a weight and seconds of a matrix [1, O, I] in a format, with a correction."""
    began, (outputs, inputs) = time.monotonic(), weight.shape[1:]
    factor, cost = Factor.of(H, format.dim), Curvature(damp(H))
    left, errors = weight, []  # the first matrix takes what is largest in the weight, further ones what is left of it
    for _ in range(options.turns if correction else 1):
        added = truncated(left, H, correction)
        made = fit(Problem(weight - added, H, factor), format, kmeans.kmeans, options.rounds, 0)
        left = weight - format.grid(made.operands).at(made.index_NOI)
        errors += [left - added, left - truncated(left, H, correction)]
    best = min(float(cost.cost(error) / cost.cost(weight)) for error in errors)
    bits = format.stored_bits(outputs, inputs) + 16 * correction * (outputs + inputs)
    return best, bits / (outputs * inputs), time.monotonic() - began


def truncated(residual: Tensor, H: Tensor, rank: int) -> Tensor:
    """The matrix of a rank that is best for a residual [1, O, I] under H: truncated where H is the identity."""
    if rank == 0:
        return torch.zeros_like(residual)
    root = torch.linalg.cholesky(damp(H))
    u, s, v = torch.linalg.svd(residual @ root, full_matrices=False)
    kept = u[..., :rank] * s[:, None, :rank] @ v[:, :rank]
    return torch.linalg.solve_triangular(root.mT, kept.mT, upper=True).mT


def decoder_layer(layer: Layer) -> int:
    """The number of the decoder layer that a matrix is in; -1 for none."""
    found = re.search(r"\.(\d+)\.", layer.name)
    return int(found[1]) if found else -1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 15, 25], help="decoder layers")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dim", type=int, default=4)
    parser.add_argument("--corrections", type=int, nargs="*", default=[4, 16], help="ranks of corrections")
    parser.add_argument("--turns", type=int, default=2, help="of correction and codebook")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
