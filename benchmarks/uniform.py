"""What the table format itself is worth: a uniform grid with group scales, given our fit and our training.

    python benchmarks/uniform.py convert --model <folder> --calibration a.json b.txt --mlp 2:64 --output <checkpoint>
    python benchmarks/uniform.py train stage=distill checkpoint=<checkpoint> model=… cache=… mode=e2e train.…
    python benchmarks/quality.py … --checkpoint uniform=outputs/SR-001/checkpoints/best

Group scales are low-rank scales whose B is fixed: row k of it is constant on the columns of group k and zero
elsewhere, so that A holds one number a row and group. The table is fixed too, at 2^bits evenly spaced values
around zero (-1.5, -0.5, 0.5, 1.5), all of which are used, so no zero point is stored. What remains goes through
the package's own code: indices and A are fitted under the same curvature with the same error compensation and
descent, and latent weights (`train.learn.latent`) and A learn as in any run. Everything after `train` is a command
line of `launch.py`.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from conversion import convert_layers, convert_option, texts
from peers.grid import Grid, parse
from torch import Tensor
from transformers import PreTrainedModel

from qat import checkpoints
from qat import machine as machines
from qat.artifacts import MANIFEST, read_manifest
from qat.config import (
    ConvertConfig,
    InstanceConfig,
    ModelConfig,
    ModelSource,
    QuantConfig,
    TableConfig,
)
from qat.convert import convert
from qat.distill import parameters
from qat.models import ModelFolder, locate
from qat.quant import assign, scales
from qat.quant.fit import CG_ITERATIONS, Cluster, Problem, Tables
from qat.quant.layers import Layer, select

NAME = "uniform"  # how the presets of such checkpoints begin
TRAINED = {"codebooks": (), "scales": ("scale_A",), "latent": ("latent",)}


def main() -> None:
    """Converts, or trains with `launch.py`'s command line."""
    if sys.argv[1:2] == ["train"]:
        sys.exit(train(sys.argv[2:]))
    options = arguments()
    machine = machines.resolve(InstanceConfig(name="auto", micro_batch=options.micro_batch))
    folder = as_artifact(locate(ModelConfig(name="model", source=ModelSource.folder, path=options.model), Path()))
    teacher = folder.load(torch.float32, torch.device("cpu"))
    rows = texts(options.calibration, folder, options.length, options.calibration_tokens)
    layers = on_grid(teacher, parse(options.mlp), parse(options.attention))
    settings = convert_option(options.convert)
    began = time.monotonic()
    made = converted(layers, folder, teacher, rows, settings, machine)
    student = folder.load(torch.float32, torch.device("cpu"))
    convert.install(student, {one.layer.name: one.module for one in made})
    checkpoints.save(student, Path(options.output), checkpoints.describe(folder, preset(layers), layers))
    print(f"{options.output}: {len(layers)} layers in {time.monotonic() - began:.0f} s")


def train(words: list[str]) -> int:
    """A run of `launch.py` in which of the quantized layers only A and latent weights learn."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import launch

    with patch.dict(parameters.KINDS, TRAINED):
        return launch.main.main([*words, "train.learn.codebooks=0"], launch.launch)


def as_artifact(folder: ModelFolder) -> ModelFolder:
    """The folder by the key that runs know it by, if a run made it: one of `outputs/artifacts/models`."""
    if not (folder.path / MANIFEST).is_file():
        return folder
    return replace(folder, fingerprint=str(read_manifest(folder.path)["key"]))


def on_grid(model: PreTrainedModel, mlp: tuple[int, int], attention: tuple[int, int]) -> list[Layer]:
    """Every layer with as many ranks as a row has groups."""
    tables = TableConfig(bits=mlp[0], rank=1), TableConfig(bits=attention[0], rank=1)
    group = {"mlp": mlp[1], "attn": attention[1]}
    layers = select(model, QuantConfig(NAME, *tables))
    return [replace(layer, rank=layer.shape[1] // group[layer.kind]) for layer in layers]


def preset(layers: list[Layer]) -> QuantConfig:
    """The layers' bits and ranks as a preset; the ranks are those of the first of each kind."""
    first = {kind: next(layer for layer in layers if layer.kind == kind) for kind in ("mlp", "attn")}
    mlp, attention = (TableConfig(bits=layer.bits, rank=layer.rank) for layer in first.values())
    return QuantConfig(f"{NAME}_q{mlp.bits}a{attention.bits}", mlp, attention)


def grid(layer: Layer) -> Grid:
    """What a layer costs: indices and scales. Table and B are known, and there is no zero point."""
    return Grid(layer.bits, layer.shape[1] // layer.rank, 0)


def converted(
    layers: list[Layer],
    folder: ModelFolder,
    teacher: PreTrainedModel,
    calibration_NL: Tensor,
    settings: ConvertConfig,
    machine: machines.Machine,
) -> list[convert.Converted]:
    """The package's conversion with another fit."""
    with patch.multiple(convert, fit=fit, improve=improve):
        return convert_layers(layers, folder, teacher, calibration_NL, settings, machine)


def fit(problem: Problem, bits: int, rank: int, cluster: Cluster, rounds: int, sweeps: int) -> Tables:
    """As the package's `fit`, with table and B fixed."""
    weight, h = problem.weight_NOI, problem.importance_NI
    tables = start(weight, bits, rank)
    for _ in range(rounds):
        index = assign.nearest(weight, tables.scale(), tables.table_NK)
        Q, groups = scales.look_up(tables.table_NK, index), tables.B_NRI.mT
        A = ((weight * Q * h[:, None]) @ groups) / ((Q.square() * h[:, None]) @ groups)  # no value is zero
        tables = replace(tables, index_NOI=index, A_NOR=A)
    return improve(problem, problem.leave(tables), sweeps)


def improve(problem: Problem, tables: Tables, sweeps: int) -> Tables:
    """As the package's `improve`, with table and B fixed."""
    weight, cost = problem.weight_NOI, problem.curvature
    tables = problem.enter(tables)
    index = assign.compensated(weight, tables.scale(), tables.table_NK, problem.factor)
    tables = refine(problem, replace(tables, index_NOI=index))
    for _ in range(sweeps):
        index = assign.descended(weight, tables.scale(), tables.table_NK, cost, tables.index_NOI)
        tables = refine(problem, replace(tables, index_NOI=index))
    return problem.leave(tables)


def refine(problem: Problem, tables: Tables) -> Tables:
    """A under the whole curvature, indices fixed."""
    h = problem.curvature.inputs_NII.diagonal(dim1=1, dim2=2)
    rows = scales.rows(scales.look_up(tables.table_NK, tables.index_NOI), tables.B_NRI, h)
    A = scales.conjugate_gradient(tables.A_NOR, rows, problem.weight_NOI, problem.curvature, CG_ITERATIONS)
    return replace(tables, A_NOR=A)


def start(weight_NOI: Tensor, bits: int, groups: int) -> Tables:
    """Scales at which a normal distribution loses least on so many evenly spaced values (Max 1960, table II)."""
    N, outputs, inputs = weight_NOI.shape
    step = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}.get(bits, 6 / 2**bits)
    table = torch.arange(2**bits, device=weight_NOI.device, dtype=torch.float32) - (2**bits - 1) / 2
    deviation = weight_NOI.view(N, outputs, groups, -1).square().mean(3).sqrt()
    B = torch.eye(groups, device=weight_NOI.device).repeat_interleave(inputs // groups, dim=1)
    index = torch.zeros(weight_NOI.shape, dtype=torch.uint8, device=weight_NOI.device)
    return Tables(index, table.expand(N, -1).contiguous(), step * deviation, B.expand(N, -1, -1).contiguous())


def arguments() -> argparse.Namespace:
    """The command line of `convert`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["convert"], help="or train, with a command line of launch.py")
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--mlp", default="2:64", help="bits:group")
    parser.add_argument("--attention", default="4:64", help="bits:group")
    parser.add_argument("--convert", default="thorough", help="an option of conf/convert")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--output", required=True, help="the checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()
