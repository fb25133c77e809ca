"""`qat.load` and `qat.convert`: what the command does, in Python.

    words.py    arguments as words of the command line, composed and checked by `qat.cli`
    student.py  what both give: a model of transformers with its tokenizer, which `save` exports

Weights are quantized by `stage=convert`, written by `stage=export` and read by who reads checkpoints; there is no other
way to do any of it. Nothing is printed; `logging` says how far a conversion is.
"""

import os
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat import identities, names, scratch, transfer
from qat.checkpoint_files import find
from qat.cli import checks, job, registered
from qat.config import Config
from qat.errors import ConfigError
from qat.library import student, words
from qat.library.student import Student
from qat.library.words import PathLike, Text, Words

__all__ = ["Student", "convert", "load"]


def load(
    name: PathLike,
    *,
    model: PathLike | None = None,
    outputs: PathLike = Config.outputs,
    overrides: Words = (),
) -> Student:
    """A run, a checkpoint or an export as a model of transformers.

        model, tokenizer = qat.load("SR-001")

    Args:
        name: what `checkpoint=` takes (a run, a registered name, a path), or the folder of an export that transformers
            reads: packed, hf or compressed.
        model: the teacher of a checkpoint that no run says: a folder, an option of the group `model`, or a repository
            of the hub. None takes what the run was made with.
        outputs: where runs lie; a teacher that has to be unpacked lands below it, as with the command.
        overrides: more words of the command line, such as `instance=cpu` or `instance.precision=fp32`.

    Raises:
        ConfigError: nothing is called that, or it is an export that transformers does not read.
        ArtifactError: a file is damaged, or the checkpoint is of another teacher.
        MissingError: the teacher cannot be had.
    """
    word, folder, more = os.fspath(name), Path(name).expanduser(), words.refuse_said(overrides)
    with words.apart():
        if kind := student.kind_of(folder):
            return student.of_export(folder, kind, words.composed(["stage=chat", *more]))
        place = names.checkpoint(word, Path(outputs).expanduser())
        if place is None:
            raise ConfigError(f"{word} is no student: name a run, a checkpoint or an export")
        said = [*words.of_teacher(place, model), f"outputs={words.value(outputs)}", *more]
        config = words.composed([*said, "stage=chat", f"checkpoint={words.value(word)}"])
        registered.check(config)
        config = transfer.with_named(config)
        return student.of_checkpoint(config, find(Path(str(config.checkpoint.path))), said)


def convert(
    model: PreTrainedModel | PathLike,
    quant: str | Mapping[str, Any] = "q2a4",
    text: Text | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    outputs: PathLike | None = None,
    overrides: Words = (),
) -> Student:
    """Quantizes a model, by the conversion that `stage=convert` is.

        student = qat.convert(model, quant="q2a4", text=["a document", "another"])

    Args:
        model: a causal language model of transformers in memory, which stays as it is; or a folder, an option of the
            group `model`, or a repository of the hub.
        quant: an option of the group, or a mapping with its keys: `{"mlp": {"bits": 3, "rank": 8}, "attn": None}`.
        text: what the errors of weights are weighed by: documents, each a text, or the path of a file, a folder or a
            glob as `data=text` reads it. An eighth is held apart, to measure on. None has the model write it, as the
            command does.
        tokenizer: of a model in memory; None takes the one of `model.name_or_path`.
        outputs: where the conversion is recorded as a run and its artifacts are kept; None keeps nothing.
        overrides: more words of the command line, such as `convert=thorough` or `convert.calibration_tokens=65536`;
            where `quant` is an option, keys of the group as well: `quant.megabytes=56` beside `quant="budget"`.

    Raises:
        ConfigError: an argument, or what several ask for together, cannot work.
        QatError: as `stage=convert`.
    """
    named = isinstance(quant, str)
    more = words.refuse_said(overrides, "quant" if named else "")
    with words.apart(), ExitStack() as kept:
        home = _temporary(kept) if outputs is None else Path(outputs).expanduser()
        said = [*_teacher(model, tokenizer, home), *words.of_text(text, home / "artifacts")]
        said += [f"outputs={words.value(home)}", "tracker=none", *(word for word in more if not _of_quant(word))]
        preset = [f"quant={words.value(quant)}", *filter(_of_quant, more)] if named else []
        config = words.composed(["stage=convert", *preset, *said])
        if isinstance(quant, Mapping):
            config = replace(config, quant=words.mapped(quant))
            checks.check(config)
        job.check([config])
        run = home / identities.claim_run(home)
        run.mkdir()
        job.start(config, run, job.command_line(["stage=convert", *preset, *said]), [*preset, *said])
        made = student.of_checkpoint(config, find(run), said)
        weakref.finalize(made.model, kept.pop_all().close)
    return made


def _of_quant(word: str) -> bool:
    return word.lstrip("+").startswith("quant.")


def _temporary(kept: ExitStack) -> Path:
    """An outputs folder that is there as long as the student."""
    return kept.enter_context(scratch.folder(Path(tempfile.gettempdir()) / "qat-library"))


def _teacher(model: PreTrainedModel | PathLike, tokenizer: PreTrainedTokenizerBase | None, outputs: Path) -> list[str]:
    """Words for the model that is quantized."""
    if not isinstance(model, str | os.PathLike):
        return words.of_loaded(model, tokenizer, outputs / "artifacts")
    if tokenizer is not None:
        raise ConfigError("tokenizer goes with a model in memory: a folder or a repository has its own")
    return words.of_model(os.fspath(model))
