"""Arguments of Python's functions as words of the command line, so that both mean the same and are checked alike."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qat import names, options, scratch
from qat.artifacts import MANIFEST, hashed, obtain, read_manifest, write_text
from qat.cli import arguments, main, recorded
from qat.cli.arguments import quote
from qat.cli.compose import MISTAKES, explain
from qat.config import Config, QuantConfig
from qat.errors import ConfigError, MissingError, reason
from qat.quiet import quiet

PathLike = str | os.PathLike[str]
Text = PathLike | Sequence[str]
Words = Sequence[str]

SAID = ("stage", "outputs", "model", "quant", "checkpoint", "export", "tracker")  # by arguments, never as overrides
HUB = re.compile(r"[\w.-]+/[\w.-]+")
UNNAMED = "own"  # stands where a preset would have its name
TEXT = "text.jsonl"


@contextmanager
def apart() -> Iterator[None]:
    """Inside, nothing is printed, and Hydra reads options as the command has it; both are as before at the end."""
    plugins, kinds = Plugins.instance().plugin_type_to_subclass_list[SearchPathPlugin], SourcesRegistry.instance().types
    searched, known = list(plugins), dict(kinds)
    try:
        with quiet():
            yield
    finally:
        plugins[:] = searched
        kinds.update(known)


def composed(words: Words) -> Config:
    """The checked configuration of a command line.

    Raises:
        QatError: what is wrong with it, in the command's own sentence.
    """
    return main.check(arguments.parse(list(words))).configs[0]


def refuse_said(overrides: Words, changed: str = "") -> Words:
    """The overrides, none of which says what an argument does.

    Args:
        overrides: as given.
        changed: a section of which an argument chooses an option, whose keys may be set besides.

    Raises:
        ConfigError: one does, or they are no list of words.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides}: give a list of words, as in overrides=['instance=cpu']")
    for word in overrides:
        key = word.lstrip("+").partition("=")[0]
        section, below, _ = key.partition(".")
        if word.startswith("-") or (section in SAID and not (below and section == changed)):
            raise ConfigError(f"{word} cannot be one of the overrides: the function's own arguments say that")
    return overrides


def value(given: Any) -> str:
    """A value as the command line takes it."""
    return str(given).lower() if isinstance(given, bool) else quote(str(given))


def of_model(model: str) -> list[str]:
    """Words for a folder, an option or a repository of the hub, whichever is there.

    Raises:
        ConfigError: it is a folder and an option.
    """
    path, is_option = Path(model).expanduser(), model in _options("model")
    if path.is_dir() and is_option:
        raise ConfigError(f"model={model} is an option and a folder here: write ./{model} for the folder")
    if path.is_dir():
        return ["model=local", f"model.path={quote(str(path))}"]
    if HUB.fullmatch(model):
        said = {"repo": model, "name": model.rpartition("/")[2], "revision": "null", "vocab_size": "null"}
        return ["model=qwen3_0_6b", *(f"model.{key}={word}" for key, word in said.items())]
    return [f"model={quote(model)}"]


def of_loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, artifacts: Path) -> list[str]:
    """Words for a model in memory, which becomes an artifact.

    Args:
        model: of transformers.
        tokenizer: None takes the one of what it was loaded from.
        artifacts: the artifacts folder.

    Raises:
        ConfigError: it is no model of transformers.
        MissingError: no tokenizer is found.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model is {type(model).__name__}, not a model of transformers: merge adapters into it first")
    spoken = tokenizer or _tokenizer_of(model)
    name = re.sub(r"[^\w.-]", "_", Path(model.name_or_path or "").name or str(model.config.model_type))
    place = artifacts / "models"
    place.mkdir(parents=True, exist_ok=True)
    with scratch.folder(place / name) as saved:
        model.save_pretrained(saved)
        spoken.save_pretrained(saved)
        files = sorted(path for path in saved.iterdir() if path.is_file())
        content = dict(zip([path.name for path in files], hashed(files), strict=True))
        folder = obtain(artifacts, "models", name, content, partial(_moved, files)).folder
    return ["model=local", f"model.path={quote(str(folder))}"]


def of_text(text: Text | None, artifacts: Path) -> list[str]:
    """Words for the text; documents become an artifact.

    Raises:
        ConfigError: there are no documents, or one of them is no text.
    """
    if text is None:
        return []
    if isinstance(text, str | os.PathLike):
        return ["data=text", f"data.path={quote(os.fspath(text))}"]
    documents = list(text)
    if not documents or not all(isinstance(document, str) and document.strip() for document in documents):
        raise ConfigError("text takes documents, each a text that is not empty, or the path of a file")
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    inputs = {"sha256": hashlib.sha256(lines.encode()).hexdigest()}
    folder = obtain(artifacts, "texts", "text", inputs, partial(_written, lines)).folder
    return ["data=text", f"data.path={quote(str(folder / TEXT))}"]


def of_teacher(checkpoint: Path, model: PathLike | None) -> list[str]:
    """Words that give a checkpoint its teacher: those of its run, where nothing is said.

    Raises:
        ConfigError: nobody knows where the teacher is.
    """
    if model is not None:
        return of_model(os.fspath(model))
    run = names.run_of(checkpoint)
    if run is not None and (run / recorded.FILE).is_file():
        return [f"--config-path={run}"]
    if not (checkpoint / MANIFEST).is_file():  # a registered name, or a state dict: of the default model
        return []
    teacher = str(read_manifest(checkpoint).get("model"))
    if teacher in _options("model"):
        return [f"model={teacher}"]
    raise ConfigError(f"{checkpoint} was made from {teacher}, and no run says where that is: give model=<its folder>")


def mapped(quant: Mapping[str, Any]) -> QuantConfig:
    """The section `quant` that a mapping is.

    Raises:
        ConfigError: a key or a value of it does not exist.
    """
    try:
        whole = OmegaConf.merge(OmegaConf.structured(Config), {"quant": {"name": UNNAMED, **quant}})
        return cast(QuantConfig, OmegaConf.to_object(whole.quant))
    except MISTAKES as error:
        raise ConfigError(explain(error)) from None


def _options(group: str) -> list[str]:
    return [file.stem for file in options.files(group)]


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of what a model was loaded from."""
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False))
    except (OSError, ValueError) as error:
        where = model.name_or_path or "a model that was not loaded from anywhere"
        raise MissingError(f"no tokenizer is found for {where} ({reason(error)}): give tokenizer=<its own>") from None


def _moved(files: list[Path], folder: Path) -> dict[str, Any]:
    for file in files:
        file.rename(folder / file.name)
    return {}


def _written(lines: str, folder: Path) -> dict[str, Any]:
    write_text(folder / TEXT, lines)
    return {}
