"""Our presets against other quantizers by the megabytes of a file: KL to the teacher, as a table and a picture.

    pip install hqq auto-round datasets
    pip install --no-deps gptqmodel pypcre tokenicer logbar device-smi defuser torchao threadpoolctl
    python benchmarks/quality.py --model <folder> --calibration a.json b.txt --evaluation chat.json wiki.txt \
        --methods rtn hqq gptq autoround --bits 2:64 3:64 4:64
    python benchmarks/quality.py --model <folder> --calibration a.json b.txt --evaluation chat.json wiki.txt \
        --ours q2a4 q2a4_r8 q3a4_r8 q4a4 --convert fast
    python benchmarks/quality.py --model <folder> --evaluation chat.json wiki.txt \
        --checkpoint q2a4=outputs/SR-001/checkpoints/best q2a4=outputs/SR-002/checkpoints/best
    python benchmarks/quality.py --draw --merge elsewhere.json

`--bits 2:64` quantizes the MLP to 2 bits in groups of 64 consecutive inputs; attention always gets 4 bits in
groups of 64. Megabytes are of all weights: indices, scales (16 bits), zero points (as each format stores them), for
ours the bytes of the packed file, and 16 bits for what nobody quantized, such as the embedding of all peers.
Everything that calibrates sees the same tokens; everything is measured by one function on the same rows. No weight of
a peer counts before every group of every layer was found to hold no more values than its bits can tell apart, and to
resemble the layer's own. Checkpoints of one name are one model trained from several seeds: a point at their mean, with
the deviation in its row.

GPTQModel 7.7 asks for a newer torch than the one pinned here and works with it, so pip must not have its way.
Evaluation costs most on a CPU: `--precision bf16` is much faster there and reads slightly lower (docs/LOG.md).

SmolLM2's own weights, as the wheel has them, lie on 4-bit grids in groups of 32, so such groups say nothing. In
groups of 64 they hold more than 16 values: a row has that count (`teacher_levels`) beside its own (`levels`).

What is made is kept: weights under `--outputs`, figures in `--json`. A command that was stopped, or that is
given with more methods, does what is missing; a row is made anew when anything that shaped it has changed.
"""

import argparse
import importlib.util
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from conversion import convert_option, convert_preset, texts
from evaluation import Entry, Evaluation, Student, add_arguments, as_packed, digest, size_of, trained
from peers import PEERS, Peer
from peers.grid import Grid, levels, parse, prove
from results import OURS, Results, draw, table
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qat.artifacts import obtain
from qat.config import QuantConfig, WeightConfig
from qat.convert.convert import install
from qat.errors import ConfigError, QatError, UnavailableError
from qat.quant.architectures import Layer, select
from qat.quant.places import matrix

ATTENTION = (4, 64)
WEIGHTS = "weights.safetensors"


class Work(Evaluation):
    """What all entries share: the teacher, its texts and the machine."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.outputs, self.calibration = Path(options.outputs), torch.empty(0, options.length, dtype=torch.long)
        if options.calibration:
            self.calibration = texts(
                options.calibration, self.folder, options.length, options.calibration_tokens, options.shares
            )
        self.calibrated = {"calibration": digest(self.calibration), "calibration_tokens": self.calibration.numel()}

    @cached_property
    def exact(self) -> PreTrainedModel:
        """The teacher in fp32, in host memory."""
        return self.folder.load(torch.float32, torch.device("cpu"))


def main() -> None:
    """Computes what is missing, then prints the table and draws the picture."""
    options = arguments()
    logging.basicConfig(level=logging.WARNING)
    results, skipped = Results(Path(options.json)), {}
    try:
        for path in options.merge:
            results.merge(Results(Path(path)))
        if not options.draw:
            work = Work(options)
            for entry in entries(work, options, skipped):
                work.measure(entry, results)
        rows = results.rows
    except QatError as error:
        raise SystemExit(f"quality.py: {error}") from None
    print(table(rows, skipped))
    if rows and importlib.util.find_spec("matplotlib"):
        draw(rows, Path(options.picture))
    else:
        print("\nno picture: there is nothing to draw, or no matplotlib to draw with (--draw does it elsewhere)")


def entries(work: Work, options: argparse.Namespace, skipped: dict[str, str]) -> Iterator[Entry]:
    """Everything that was asked for; peers that cannot run here are told in `skipped`."""
    for name in options.methods:
        try:
            quantize, settings = PEERS[name].load()
        except UnavailableError as error:
            skipped[PEERS[name].label] = str(error)
            continue
        for text in options.bits:
            yield peer(work, PEERS[name], text, quantize, settings)
    for name in options.ours:
        yield preset(work, name, options.convert)
    named: dict[str, list[Path]] = defaultdict(list)
    for given in options.checkpoint:
        name, equals, path = given.partition("=")
        if not equals:
            raise ConfigError(f"--checkpoint {given} is not name=path")
        named[name].append(Path(path))
    for name, paths in named.items():
        yield trained(work, name, paths)


def peer(work: Work, peer: Peer, bits: str, quantize: Callable, settings: dict[str, Any]) -> Entry:
    """A peer's model: its dequantized weights in the teacher."""
    layers, mlp = layers_of(work.exact), peer.grid(*parse(bits))
    grids = {layer.name: mlp if layer.role == "mlp" else peer.grid(*ATTENTION) for layer in layers}
    shaping = {"mlp": bits, "attention": "{}:{}".format(*ATTENTION), **settings}
    shaping |= work.calibrated if peer.calibrates else {}
    inputs = {"teacher": work.folder.fingerprint, "method": peer.label, **shaping}

    def fill(folder: Path) -> dict[str, Any]:
        began = time.monotonic()
        made = quantize(work.folder, grids, work.calibration)
        seconds = time.monotonic() - began
        save_file({name: weight.contiguous() for name, weight in made.items()}, folder / WEIGHTS)
        return {"seconds": round(seconds, 1)}

    def make(dtype: torch.dtype) -> Student:
        kept = obtain(work.outputs / "artifacts", "peers", f"{peer.label}-{bits.replace(':', 'g')}", inputs, fill)
        weights = load_file(kept.folder / WEIGHTS)
        proof = proved(work.exact, weights, layers, grids)
        student = work.folder.load(dtype, work.machine.device)
        with torch.no_grad():
            for name, weight in weights.items():
                matrix(student, name).copy_(weight)
        return student, {**size_of(layers, grids, work.folder), **proof, "seconds": kept.manifest["seconds"]}

    return Entry(peer.label, bits, shaping, (make,))


def proved(
    exact: PreTrainedModel, weights: dict[str, torch.Tensor], layers: list[Layer], grids: dict[str, Grid]
) -> dict[str, dict[str, int]]:
    """The most values found in a group by kind of layer, and as many as the teacher's own weights have there.

    Raises:
        NumericsError: a layer's weight is not a quantized one, or not that layer's.
    """
    found: dict[str, dict[str, int]] = {"levels": {}, "teacher_levels": {}}
    for layer in layers:
        own, grid = matrix(exact, layer.name), grids[layer.name]
        counts = prove(layer.name, weights[layer.name], own, grid), levels(own, grid.group)
        for counted, count in zip(found.values(), counts, strict=True):
            counted[layer.role] = max(counted.get(layer.role, 0), count)
    return found


def preset(work: Work, name: str, convert: str) -> Entry:
    """A preset of ours, converted and not trained."""
    settings = convert_option(convert)
    shaping = {"convert": {key: value for key, value in asdict(settings).items() if key != "calibration_tokens"}}

    def make(dtype: torch.dtype) -> Student:
        began = time.monotonic()
        made = convert_preset(name, work.folder, work.exact, work.calibration, settings, work.machine)
        seconds = time.monotonic() - began
        student = work.folder.load(dtype, work.machine.device)
        install(student, {one.layer.name: one.module for one in made})
        student, sizes = as_packed(student, [one.layer for one in made], work.folder)
        return student, {**sizes, "seconds": round(seconds, 1)}

    return Entry(f"{OURS}, convert={convert}", name, shaping | work.calibrated, (make,))


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """Every layer that is quantized, MLP and attention; bits and rank are not theirs."""
    return select(model, QuantConfig("all", mlp=WeightConfig(bits=2, rank=1), attn=WeightConfig(bits=2, rank=1)))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--calibration", nargs="+", help="files that methods may look at")
    parser.add_argument("--shares", nargs="+", type=float, help="of the calibration files; equal if not given")
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="of all calibration files")
    parser.add_argument("--methods", nargs="+", default=[], choices=PEERS, help="peers")
    parser.add_argument("--bits", nargs="+", default=["2:64", "3:64", "4:64"], help="of the MLP, with the group")
    parser.add_argument("--ours", nargs="+", default=[], metavar="PRESET", help="options of conf/quant, converted")
    parser.add_argument("--convert", default="fast", help="an option of conf/convert")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="NAME=PATH", help="trained students")
    parser.add_argument("--outputs", default="outputs", help="where quantized weights are kept")
    parser.add_argument("--json", default="docs/quality.json", help="where figures are kept")
    parser.add_argument("--merge", nargs="+", default=[], metavar="JSON", help="files whose rows go there as well")
    parser.add_argument("--picture", default="docs/quality.png")
    parser.add_argument("--draw", action="store_true", help="compute nothing")
    options = parser.parse_args()
    if not options.draw and not (options.model and options.evaluation):
        parser.error("--model and --evaluation are needed, or --draw")
    if (options.methods or options.ours) and not options.calibration:
        parser.error("--methods and --ours need --calibration")
    return options


if __name__ == "__main__":
    main()
