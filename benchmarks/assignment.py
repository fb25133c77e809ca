"""What error compensation gains over nearest indices, layer by layer, on a real model.

    python benchmarks/assignment.py --model <folder> --preset q2a4_r8

Codebook and scales are those of the alternating fit; then each layer gets its indices twice, nearest to the
grid and compensated under the second moment of its inputs on the project's own prompts. Prints, for each
kind of layer, the mean output error of both relative to the output, how many layers compensation betters,
and where it gains least.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from conversion import preset

from qat.cache.batch import Text
from qat.config import DataConfig, DataSource, ModelConfig, ModelSource, Packing
from qat.conversion.convert import STACK_BYTES, stacks
from qat.conversion.moments import gather
from qat.data import packing, texts, thinking
from qat.data.documents import Document
from qat.machine import exact_matmul
from qat.models import locate
from qat.quant import assign, kmeans, lookup
from qat.quant.architectures import select
from qat.quant.curvature import Curvature, Factor
from qat.quant.fit import importance
from qat.quant.formats.codebook_fit import alternate, start
from qat.quant.places import matrix


def main() -> None:
    """Converts up to the assignment, both ways."""
    options = arguments()
    folder = locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), Path())
    model, tokenizer = folder.load(torch.float32, torch.device("cpu")), folder.tokenizer()
    questions = texts.prompts(DataConfig(name="prompts", source=DataSource.selfgen))
    documents = [Document(q, thinking.chat_tokens(tokenizer, [{"role": "user", "content": q}])) for q in questions]
    rows = packing.pack(documents, 128, Packing.joined, 0).input_ids[: options.tokens // 128].long()
    layers = select(model, preset(options.preset))
    moments = gather(model, layers, Text(rows).batches(8))
    print(f"{options.preset}: {rows.numel()} tokens, {options.rounds} rounds, {len(layers)} layers")
    found = defaultdict(list)
    with torch.no_grad(), exact_matmul():
        for stack in stacks(layers, STACK_BYTES["cpu"]):
            weight = torch.stack([matrix(model, layer.name).float() for layer in stack])
            H = torch.stack([moments.inputs[layer.source] for layer in stack])
            errors = both(weight, H, 2 ** stack[0].format.bits, stack[0].format.rank, options.rounds)
            for layer, pair in zip(stack, errors.T.tolist(), strict=True):
                found[layer.name.rpartition(".")[2]].append((*pair, layer.name))
    print(f"{'':12}{'nearest':>10}{'compensated':>13}{'bettered':>10}   gains least")
    for leaf, members in found.items():
        nearest, compensated = (sum(member[i] for member in members) / len(members) for i in (0, 1))
        better = sum(after < before for before, after, _ in members)
        before, after, name = min(members, key=lambda member: member[0] / member[1])
        counts = f"{better}/{len(members)}"
        print(f"{leaf:12}{nearest:10.4f}{compensated:13.4f}{counts:>10}   {before / after:.2f} times: {name}")


def both(weight: torch.Tensor, H: torch.Tensor, entries: int, rank: int, rounds: int) -> torch.Tensor:
    """Relative output errors [2, N] of nearest and of compensated indices."""
    codebooks = start(weight, importance(H), entries, rank, kmeans.kmeans)
    for _ in range(rounds):
        codebooks = alternate(codebooks, weight, importance(H))
    S, codebook = codebooks.scale(), codebooks.codebook_NK
    indices = assign.nearest(weight, S, codebook), assign.compensated(weight, S, codebook, Factor.of(H))
    errors = [Curvature(H).cost(weight - lookup.look_up(codebook, index) * S) for index in indices]
    return torch.stack(errors) / Curvature(H).cost(weight)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--preset", default="q2a4_r8")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
