"""What engines run, side by side: their own files of the teacher and ours on the same grid, by MB, KL and speed.

    pip install -e '.[engines]' llama-cpp-python
    python benchmarks/engines.py --model <folder> --cache <folder> --evaluation chat.json wiki.txt \
        --own gguf_q4_0 mlx_4bit_g64 --converted gguf_q4_0 mlx_4bit_g64 --dwq mlx_4bit_g64 \
        --trained gguf_q4_0=outputs/SR-001 mlx_4bit_g64=outputs/SR-002
    python benchmarks/engines.py --model <folder> --cache <folder> --speeds gguf_q4_0 --threads 2
    python benchmarks/engines.py --merge elsewhere.json

A preset of `conf/quant/` names an engine's grid. On each there are up to four files: what the engine's own quantizer
makes of the teacher (llama.cpp's under an importance matrix, MLX's rounding), what `mlx_lm.dwq` makes by training,
ours converted, and ours trained: runs, wherever they ran, one a seed. Whatever looks at text sees the first tokens of
the cache's training rows, which is what a run on that cache learns from; `mlx_lm.dwq` ends after `--dwq-seconds`, and
its row says how many of its `--dwq-tokens` it read (`pip install 'mlx[cuda13]'` lets it train on a GPU).

MB are those of the file of weights that an engine loads. KL is that of the weights as the engine's decoder reads them
from that file, by what measures everything in `quality.py`. Speed is that of greedy tokens after a short prompt, the
files of a preset by turns in one process, so that a busy machine slows all of them: the ratios are what to read.

Files are kept under `--outputs`, rows in `--json`: a command that was stopped, or is given more, does what is missing.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import engine_files
import speeds
import torch
from comparison import Job, add_arguments, by_name, compare
from conversion import Converter, convert_option, preset
from engine_files import engine_of
from evaluation import Entry, Evaluation, Student, digest, teacher_of
from results import Results, shown

from qat import checkpoints
from qat.artifacts import obtain, open_artifact, read_manifest
from qat.cache.reader import CacheReader
from qat.checkpoint_files import find
from qat.config import ExportConfig, ExportType
from qat.errors import ConfigError, UnavailableError
from qat.export.packed import writer as packed_writer
from qat.export.source import Source, open_source

OWN, DWQ, CONVERTED, TRAINED = "the engine's own", "mlx_lm.dwq", "ours, converted", "ours, trained"
METHODS = (OWN, DWQ, CONVERTED, TRAINED)
SPEED, OURS, PACKED = "tokens/s", "ours", "packed"  # a row's place for a text, and its files besides the engine's own


class Work(Evaluation):
    """The teacher, the text that methods may look at, and where files are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.options, self._cache = options, open_artifact(Path(options.cache))

    def reader(self, split: str) -> CacheReader:
        """The rows of a split of the cache."""
        return CacheReader(self._cache, split)

    def text(self, tokens: int, split: str = "train") -> torch.Tensor:
        """The first rows [N, L] of a split of the cache."""
        reader = self.reader(split)
        return reader.input_ids(min(reader.rows, tokens // int(self._cache.manifest["length"]))).long()

    @cached_property
    def calibration(self) -> torch.Tensor:
        """What conversions and importance matrices are made from."""
        return self.text(self.options.calibration_tokens)

    def kept(self, label: str, inputs: dict[str, Any], fill: Callable[[Path], dict[str, Any] | None]) -> Path:
        """A folder that is filled once; its manifest has what `fill` says of it, and in how many seconds."""

        def make(folder: Path) -> dict[str, Any]:
            began = time.monotonic()
            told = fill(folder) or {}
            return {**told, "seconds": round(time.monotonic() - began, 1)}

        described = {"teacher": self.folder.fingerprint, "file": label, **inputs}
        return obtain(Path(self.options.outputs) / "artifacts", "engines", label, described, make).folder


def main() -> None:
    """Makes and measures what is missing, then prints the table."""
    options = arguments()
    print(table(*compare(options, jobs(options))))


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Every file that was asked for, then speeds.

    Raises:
        ConfigError: a preset is on no engine's grid.
    """
    for name in (*options.own, *options.converted, *options.dwq, *by_name(options.trained), *options.speeds):
        engine_of(name)
    if options.model:
        work = Work(options)
        for one in entries(work):
            yield f"{one.name}, {one.method}", partial(work.measure, one)
        for name in options.speeds:
            yield f"{name}, {SPEED}", partial(speed, work, name)


def entries(work: Work) -> Iterator[Entry]:
    """Files that are measured."""
    options = work.options
    for name in options.own:
        yield entry(work, OWN, name, looked_at(work), partial(own, work, name))
    for name in options.converted:
        yield entry(work, CONVERTED, name, conversion(work), lambda name=name: ours(work, name, converted(work, name)))
    for name in options.dwq:
        yield entry(work, DWQ, name, training(work), partial(dwq, work, name))
    for name, paths in by_name(options.trained).items():
        found = [find(path) for path in paths]
        settings = {"checkpoints": [checkpoints.identity(path) for path in found]}
        yield entry(work, TRAINED, name, settings, *(partial(ours, work, name, path) for path in found))


def entry(work: Work, method: str, name: str, settings: dict[str, Any], *files: Callable[[], Path]) -> Entry:
    """A file for an engine, or one a seed."""
    makers = tuple(lambda _, file=file: student(work, name, file()) for file in files)
    return Entry(method, name, settings, makers)


def looked_at(work: Work) -> dict[str, Any]:
    """The calibration text, as settings of a row."""
    return {"calibration": digest(work.calibration), "calibration_tokens": work.calibration.numel()}


def conversion(work: Work) -> dict[str, Any]:
    """What shapes a conversion, as settings of a row."""
    return looked_at(work) | {"convert": work.options.convert}


def training(work: Work) -> dict[str, Any]:
    """What shapes a training by mlx_lm.dwq, as settings of a row."""
    limits = {"dwq_tokens": work.options.dwq_tokens, "seconds": work.options.dwq_seconds}
    return {"text": work.reader("train").text_key(), "rate": work.options.dwq_rate, **limits}


def student(work: Work, name: str, folder: Path) -> Student:
    """A file as its engine's decoder reads it, and what its row says beside figures."""
    engine = engine_of(name)
    size = engine_files.size(engine, folder)
    model = engine_files.read(engine, work.folder, folder)
    manifest = read_manifest(folder)
    told = {"engine": engine.label, "bytes": size, "megabytes": round(size / 1e6, 3), "seconds": manifest["seconds"]}
    told |= {"trained_tokens": manifest["tokens"]} if "tokens" in manifest else {}
    return model.to(work.judge.device), told


def own(work: Work, name: str) -> Path:
    """The file that the engine's own quantizer writes."""
    engine = engine_of(name)
    return work.kept(
        f"{name}_own",
        looked_at(work),
        lambda folder: engine_files.write_own(engine, work.folder, name, work.calibration, folder, work.kept),
    )


def dwq(work: Work, name: str) -> Path:
    """The file that mlx-lm writes after training.

    Raises:
        ConfigError: the preset is not MLX's.
        UnavailableError: mlx-lm is not installed.
    """
    if engine_of(name).export != "mlx":
        raise ConfigError(f"--dwq {name}: mlx_lm.dwq trains grids of MLX, such as mlx_4bit_g64")
    try:
        from peers import dwq as trainer
    except ImportError as error:
        raise UnavailableError(f"mlx_lm.dwq cannot run here ({error}): pip install mlx-lm") from None

    options, (bits, group) = work.options, engine_files.grid_of(name)
    text, held_out = work.text(options.dwq_tokens), work.text(options.dwq_validation, "eval")
    texts = {"text": digest(text), "held_out": digest(held_out)}
    limits = {"rate": options.dwq_rate, "seconds": options.dwq_seconds}
    return work.kept(
        f"{name}_dwq",
        {**texts, **limits, **trainer.SETTINGS},
        lambda folder: trainer.quantize(work.folder, folder, bits, group, text, held_out, **limits),
    )


def converted(work: Work, name: str) -> Path:
    """A checkpoint of the teacher on a preset's grid, not trained."""
    settings, quant = convert_option(work.options.convert), preset(name)

    def fill(folder: Path) -> dict[str, Any]:
        model = work.folder.load(torch.float32, work.machine.device)
        made = Converter(work.folder, model, work.calibration, settings, work.machine).convert(quant)
        checkpoints.native.write_layers({one.layer.name: one.module for one in made}, folder)
        return checkpoints.describe(work.folder, quant, [one.layer for one in made])

    return work.kept(f"{name}_converted", looked_at(work) | {"convert": asdict(settings)}, fill)


def ours(work: Work, name: str, checkpoint: Path) -> Path:
    """The file of a student for its engine."""

    def fill(folder: Path) -> None:
        engine_files.write_ours(engine_of(name), source(work, checkpoint), folder)

    return work.kept(f"{name}_ours", {"checkpoint": checkpoints.identity(checkpoint)}, fill)


def source(work: Work, checkpoint: Path) -> Source:
    """A student as exporters take it."""
    return open_source(teacher_of(checkpoint, work.folder), checkpoint)


def speed(work: Work, name: str, results: Results) -> None:
    """Adds rows of tokens a second: of the engine's own file, of ours (trained if there is one), of our packed form.

    Raises:
        ConfigError: the preset's engine does not run on processors.
    """
    engine, threads = engine_of(name), work.options.threads
    run = speeds.BY_EXPORT.get(engine.export)
    if run is None:
        raise ConfigError(f"--speeds {name}: of these engines {' and '.join(speeds.BY_EXPORT)} run on processors")
    given = by_name(work.options.trained).get(name)
    checkpoint = find(given[0]) if given else None
    student = {"checkpoint": checkpoints.identity(checkpoint)} if checkpoint else conversion(work)
    settings = {"teacher": work.folder.fingerprint, **student, "threads": threads, "written": speeds.WRITTEN}
    rows = {method: _row(method, name, settings) for method in (OWN, OURS, PACKED)}
    if all(results.has(row) for row in rows.values()):
        return
    checkpoint = checkpoint or converted(work, name)
    runs = {
        OWN: run(own(work, name), threads),
        OURS: run(ours(work, name, checkpoint), threads),
        PACKED: speeds.packed(packed(work, name, checkpoint), threads),
    }
    load = {"load": round(os.getloadavg()[0], 1)}
    for method, found in speeds.measure(runs).items():
        results.add(rows[method] | found | load)


def _row(method: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "name": name, "text": SPEED, "settings": settings}


def packed(work: Work, name: str, checkpoint: Path) -> Path:
    """The packed form of a student."""

    def fill(folder: Path) -> None:
        packed_writer.write(source(work, checkpoint), folder, ExportConfig("packed", "packed", ExportType.bf16))

    return work.kept(f"{name}_packed", {"checkpoint": checkpoints.identity(checkpoint)}, fill)


def table(rows: list[dict[str, Any]], skipped: dict[str, str]) -> str:
    """Markdown: a line a file, those of a preset together; each KL with its share of the KL of the engine's own."""
    texts = sorted({row["text"] for row in rows} - {SPEED})
    heads = [
        "preset",
        "file",
        "MB",
        *(f"{text} KL" for text in texts),
        "tokens/s, times the engine's own, times packed",
    ]
    lines = [heads, ["---"] * len(heads)]
    place = {(row["name"], row["method"], row["text"]): row for row in rows}
    for name in dict.fromkeys(row["name"] for row in rows):
        for method in METHODS:
            found = [place.get((name, method, text)) for text in texts]
            if told := next((row for row in found if row), None):
                beside = [place.get((name, OWN, text)) for text in texts]
                kl = [_beside(row, its) for row, its in zip(found, beside, strict=True)]
                spoken = f"{method} ({told['trained_tokens']:,} tokens)" if method == DWQ else method
                lines.append([name, spoken, f"{told['megabytes']:.1f}", *kl, _speed(place, name, method)])
    told = [f"\n{label} was left out: {reason}" for label, reason in skipped.items()]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), *told])


def _beside(row: dict[str, Any] | None, own: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return shown(row) + (f" ({row['kl'] / own['kl']:.2f})" if own and row is not own else "")


def _speed(place: dict[tuple[str, str, str], dict[str, Any]], name: str, method: str) -> str:
    """Of the engine's own file, and of ours on the line of the better one of ours that there is."""
    best = next((one for one in (TRAINED, CONVERTED) if any(key[:2] == (name, one) for key in place)), None)
    row = place.get((name, OURS if method == best else method, SPEED))
    if row is None:
        return ""
    ratios = (f"{row['ratios'][other]:.2f}" for other in (OWN, PACKED) if other in row["ratios"])
    return ", ".join([f"{row['tokens_per_second']:.0f}", *(ratios if method != OWN else ("1", *ratios))])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "docs/engines.json")
    parser.add_argument("--cache", help="the folder of a cache, of whose training rows methods see the first")
    parser.add_argument("--own", nargs="+", default=[], metavar="PRESET", help="by the engine's own quantizer")
    parser.add_argument("--converted", nargs="+", default=[], metavar="PRESET", help="ours, not trained")
    parser.add_argument("--dwq", nargs="+", default=[], metavar="PRESET", help="of MLX, trained by mlx_lm.dwq")
    parser.add_argument("--dwq-tokens", type=int, default=32_768, help="the most that it reads")
    parser.add_argument("--dwq-seconds", type=float, default=3600.0, help="it ends then with what it has")
    parser.add_argument("--dwq-validation", type=int, default=32_768, help="held-out tokens of its own figures")
    parser.add_argument("--dwq-rate", type=float, default=1e-6, help="learning rate; the default is mlx-lm's own")
    parser.add_argument("--speeds", nargs="+", default=[], metavar="PRESET", help="measure tokens a second")
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp and torch")
    options = parser.parse_args()
    if options.model and not options.cache:
        parser.error("--model needs --cache")
    return options


if __name__ == "__main__":
    main()
