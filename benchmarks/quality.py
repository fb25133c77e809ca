"""Our presets against other quantizers by the megabytes of a file: KL to the teacher, as a table and a picture.

    pip install hqq auto-round datasets llama-cpp-python mlx-lm 'mlx[cpu]'
    pip install --no-deps gptqmodel pypcre tokenicer logbar device-smi defuser torchao threadpoolctl
    python benchmarks/quality.py --model <folder> --calibration a.json b.txt --evaluation chat.json wiki.txt \
        --methods rtn hqq gptq autoround --bits 2:64 3:64 4:64
    python benchmarks/quality.py --model <folder> --calibration a.json b.txt --evaluation chat.json wiki.txt \
        --llama-cpp IQ4_XS:IQ4_NL Q3_K_M Q4_K_M --mlx 4:64 3:64 2:64
    python benchmarks/quality.py --model <folder> --calibration a.json b.txt --evaluation chat.json wiki.txt \
        --ours q2a4 q4a4 'q3a4_r8 quant.embed={bits:5,rank:16}' 'budget quant.megabytes=66' --convert fast
    python benchmarks/quality.py --model <folder> --evaluation chat.json wiki.txt \
        --trained q2a4=outputs/SR-001 q2a4=outputs/SR-002
    python benchmarks/quality.py --draw --merge elsewhere.json

`--bits 2:64` quantizes the MLP to 2 bits in groups of 64 consecutive inputs; attention always gets 4 bits in
groups of 64. `--llama-cpp IQ4_XS:IQ4_NL` is a file of llama.cpp's as `llama-quantize` makes it, under an importance
matrix, with the embedding in IQ4_NL; without a type after the colon llama.cpp chooses that of the embedding too.
`--mlx 4:64` is a folder as `mlx_lm.convert` makes it, 4 bits in groups of 64 everywhere.

Megabytes are those of the files that hold weights: of ours the packed file, of llama.cpp the GGUF file, which holds
the tokenizer as well (1.8 MB of SmolLM2). Methods on a grid have none here: theirs are reckoned from indices, scales
(16 bits) and zero points (as each format stores them), with 16 bits for what they leave as it is, such as the
embedding. Everything that calibrates sees the same tokens; everything is measured by one function on the same rows.
No weight on a grid counts before every group of every layer was found to hold no more values than its bits can tell
apart, and to resemble the layer's own. Runs of one name are one model trained from several seeds: a point at
their mean, with the deviation in its row and in the picture, hollow with fewer than three seeds.

GPTQModel 7.7 asks for a newer torch than the one pinned here and works with it, so pip must not have its way.
Evaluation costs most on a CPU: `--precision bf16` is much faster there and reads slightly lower (docs/log/peers.md).

SmolLM2's own weights, as the wheel has them, lie on 4-bit grids in groups of 32 (Q4_1) with an embedding of 8 bits
(Q8_0), so llama.cpp's files of these two types return them unharmed, and 4 bits in blocks of 32 have it easy. In
groups of 64 they hold more than 16 values: a row has that count (`teacher_levels`) beside its own (`levels`). Its rows
of 576 are no whole number of blocks of 256: there llama.cpp takes a larger type, so its Q2_K has over 4 bits in the
MLP.

What is made is kept: weights under `--outputs`, figures in `--json`. A command that was stopped, or that is
given with more methods, does what is missing; a row is made anew when anything that shaped it has changed.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from comparison import Job, add_arguments, by_name, compare
from conversion import Converter, convert_option, texts
from conversion import preset as option
from evaluation import Entry, Evaluation, Student, as_packed, digest, size_of, stored_size, trained
from peers import PEERS, Peer, imported
from peers.grid import Grid, levels, parse, prove
from peers.stored import Stored
from picture import draw
from results import OURS, table
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qat.artifacts import obtain
from qat.config import QuantConfig, WeightConfig
from qat.conversion.convert import install
from qat.quant.architectures import Layer, select
from qat.quant.places import matrix

ATTENTION = (4, 64)
WEIGHTS = "weights.safetensors"
DENSE, IMPORTANCE, QUANTIZED = "dense.gguf", "importance.safetensors", "model.gguf"


class Work(Evaluation):
    """What all entries share: the teacher, its texts and the machine."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.outputs, self.convert = Path(options.outputs), options.convert
        self.calibration = torch.empty(0, options.length, dtype=torch.long)
        if options.calibration:
            self.calibration = texts(
                options.calibration, self.folder, options.length, options.calibration_tokens, options.shares
            )
        self.calibrated = {"calibration": digest(self.calibration), "calibration_tokens": self.calibration.numel()}

    @cached_property
    def converter(self) -> Converter:
        """Makes what is ours."""
        settings = convert_option(self.convert)
        return Converter(self.folder, self.exact, self.calibration, settings, self.machine)

    @cached_property
    def exact(self) -> PreTrainedModel:
        """The teacher in fp32, in host memory."""
        return self.folder.load(torch.float32, torch.device("cpu"))


def main() -> None:
    """Computes what is missing, then prints the table and draws the picture."""
    options = arguments()
    rows, skipped = compare(options, jobs(options))
    print(table(rows, skipped))
    if rows and importlib.util.find_spec("matplotlib"):
        draw(rows, Path(options.picture))
    else:
        print("\nno picture: there is nothing to draw, or no matplotlib to draw with (--draw does it elsewhere)")


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Everything that was asked for, by whom readers know it."""
    if not options.draw:
        work = Work(options)
        for label, entry in entries(work, options):
            yield label, lambda results, entry=entry: work.measure(entry(), results)


def entries(work: Work, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Entry]]]:
    """Makers of entries, which tell of a package that is missing.

    Raises:
        ConfigError: a word of `--trained` is not `name=path`.
    """
    students = by_name(options.trained)
    for name in options.methods:
        for bits in options.bits:
            yield PEERS[name].label, partial(peer, work, PEERS[name], bits)
    for label, make, names in (("llama.cpp", llama_cpp, options.llama_cpp), ("MLX", mlx, options.mlx)):
        for name in names:
            yield label, partial(make, work, name)
    for words in options.ours:
        yield OURS, partial(preset, work, words)
    for name, paths in students.items():
        yield name, partial(trained, work, name, paths)


def peer(work: Work, peer: Peer, bits: str) -> Entry:
    """A peer's model: its dequantized weights in the teacher."""
    quantize, settings = peer.load()
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


def llama_cpp(work: Work, name: str) -> Entry:
    """A file of llama.cpp's in a type such as `Q4_K_M`, or `IQ4_XS:IQ4_NL` with that of the embedding."""
    module, settings = imported("llama.cpp", "llamacpp", "llama-cpp-python")
    kind, _, embedding = name.partition(":")
    shaping = settings | work.calibrated

    def prepare(folder: Path) -> dict[str, Any]:
        began = time.monotonic()
        module.write(work.folder, folder / DENSE)
        save_arrays(module.importance(work.folder, work.calibration), folder / IMPORTANCE)
        return {"seconds": time.monotonic() - began}

    def fill(folder: Path) -> dict[str, Any]:
        inputs = {"teacher": work.folder.fingerprint, "method": "llama.cpp", **shaping}
        prepared, began = obtain(work.outputs / "artifacts", "peers", "llama.cpp", inputs, prepare), time.monotonic()
        weights = load_arrays(prepared.folder / IMPORTANCE)
        module.quantize(prepared.folder / DENSE, folder / QUANTIZED, kind, embedding or None, weights)
        return {"seconds": round(prepared.manifest["seconds"] + time.monotonic() - began, 1)}

    return stored(work, "llama.cpp", name, shaping, fill, lambda kept: module.read(work.folder, kept / QUANTIZED))


def mlx(work: Work, text: str) -> Entry:
    """A folder of MLX in so many bits and groups."""
    module, settings = imported("MLX", "mlx", "mlx-lm")
    bits, group = parse(text)

    def fill(folder: Path) -> dict[str, Any]:
        began = time.monotonic()
        module.quantize(work.folder, folder / "model", bits, group)
        return {"seconds": round(time.monotonic() - began, 1)}

    return stored(work, "MLX", text, settings, fill, lambda kept: module.read(work.folder, kept / "model"))


def stored(
    work: Work,
    label: str,
    name: str,
    shaping: dict[str, Any],
    fill: Callable[[Path], dict[str, Any]],
    read: Callable[[Path], Stored],
) -> Entry:
    """What an engine's own quantizer writes."""
    inputs = {"teacher": work.folder.fingerprint, "method": label, "name": name, **shaping}

    def make(dtype: torch.dtype) -> Student:
        kept = obtain(work.outputs / "artifacts", "peers", f"{label}-{name.replace(':', '-')}", inputs, fill)
        found = read(kept.folder)
        told = {**stored_size(layers_of(found.model), found), "seconds": kept.manifest["seconds"]}
        return found.model.to(work.machine.device, dtype), told

    return Entry(label, name, shaping, (make,))


def preset(work: Work, words: str) -> Entry:
    """A preset of ours, or a budget, converted and not trained."""
    settings = asdict(work.converter.settings)
    shaping = {"convert": {key: value for key, value in settings.items() if key != "calibration_tokens"}}

    def make(dtype: torch.dtype) -> Student:
        began = time.monotonic()
        made = work.converter.convert(option(words))
        seconds = time.monotonic() - began
        student = work.folder.load(dtype, work.machine.device)
        install(student, {one.layer.name: one.module for one in made})
        student, sizes = as_packed(student, [one.layer for one in made], work.folder)
        return student, {**sizes, "seconds": round(seconds, 1)}

    return Entry(f"{OURS}, convert={settings['name']}", words, shaping | work.calibrated, (make,))


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """Every layer that is quantized, MLP and attention; bits and rank are not theirs."""
    return select(model, QuantConfig("all", mlp=WeightConfig(bits=2, rank=1), attn=WeightConfig(bits=2, rank=1)))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "docs/quality.json")
    parser.add_argument("--calibration", nargs="+", help="files that methods may look at")
    parser.add_argument("--shares", nargs="+", type=float, help="of the calibration files; equal if not given")
    parser.add_argument("--methods", nargs="+", default=[], choices=PEERS, help="peers")
    parser.add_argument("--bits", nargs="+", default=["2:64", "3:64", "4:64"], help="of the MLP, with the group")
    parser.add_argument("--llama-cpp", nargs="+", default=[], metavar="TYPE[:EMBEDDING]", help="its own types")
    parser.add_argument("--mlx", nargs="+", default=[], metavar="BITS:GROUP", help="of everything, embedding included")
    parser.add_argument("--ours", nargs="+", default=[], metavar="'PRESET WORD…'", help="converted, not trained")
    parser.add_argument("--picture", help="beside --json if not given")
    parser.add_argument("--draw", action="store_true", help="compute nothing")
    options = parser.parse_args()
    options.picture = options.picture or str(Path(options.json).with_suffix(".png"))
    if not options.draw and not (options.model and options.evaluation):
        parser.error("--model and --evaluation are needed, or --draw")
    if (options.methods or options.llama_cpp or options.ours) and not options.calibration:
        parser.error("--methods, --llama-cpp and --ours need --calibration")
    return options


if __name__ == "__main__":
    main()
