"""A quantized model with its tokenizer, as people who use transformers know them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qat import machine, model_files, models
from qat.artifacts import MANIFEST, open_artifact, read_manifest
from qat.config import Config
from qat.errors import ConfigError, UnavailableError
from qat.export.card import ADAPTER
from qat.export.hf.writer import dense
from qat.export.source import open_source
from qat.installation import to_install
from qat.library.words import PathLike, Words, apart, composed, value
from qat.models import ModelFolder
from qat.models.reading import SAFE
from qat.stages import export as exports

READ = ("packed", "hf", "compressed")  # exports that transformers reads, two of them with a package beside


@dataclass(frozen=True)
class Student:
    """A quantized model with its tokenizer; it unpacks into the two.

    Attributes:
        model: of transformers, as `from_pretrained` leaves one, on the device and in the type that `instance` comes to.
            Of a run or a checkpoint every weight is written out, adapters added, which makes it an ordinary model in
            every respect; an export is as transformers reads it, its adapters put on it by PEFT.
        tokenizer: None where the model has none.
        manifest: what its checkpoint or export says of it, such as `bits_per_weight`.
        folder: of the checkpoint or export.
    """

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    folder: Path
    _teacher: ModelFolder | None = field(default=None, repr=False)
    _words: Words = field(default=(), repr=False)

    def __iter__(self) -> Iterator[Any]:
        """The model, then the tokenizer."""
        return iter((self.model, self.tokenizer))

    def save(self, folder: PathLike, export: str = "packed", **settings: Any) -> Path:
        """Writes it as `stage=export` does: compared with the checkpoint, and in place whole or not at all.

        Args:
            folder: a new one, or an older export, which is replaced.
            export: an option of the group: `packed`, `hf`, `gguf`, `mlx` and so on.
            settings: keys of the section `export`, such as `dtype="fp16"`.

        Returns:
            The folder.

        Raises:
            ConfigError: this export cannot hold the student, or the folder has other files in it.
            QatError: as `stage=export`.
        """
        if self._teacher is None:
            raise ConfigError(f"{self.folder} is an export already: copy the folder, or load the run it was made from")
        said = {"export": export, "export.output": Path(folder).expanduser(), "checkpoint": self.folder}
        said |= {f"export.{key}": given for key, given in settings.items()}
        with apart():
            config = composed([*self._words, "stage=export", *(f"{key}={value(said[key])}" for key in said)])
            exports.write(config.export, self._teacher, self.folder)
        return exports.place(config.export)


def of_checkpoint(config: Config, checkpoint: Path, words: Words) -> Student:
    """The student of a checkpoint, every weight written out, with what adapters add to it.

    Args:
        config: names teacher and machine.
        checkpoint: a folder or a V2 state dict.
        words: of the command line, from which `config` was composed.

    Raises:
        ArtifactError: the checkpoint is damaged or of another teacher.
        MissingError: the teacher or the device cannot be had.
    """
    resolved = machine.resolve(config.instance)
    teacher = models.locate(config.model, Path(config.outputs) / "artifacts")
    source = open_source(teacher, checkpoint, merge=True)
    model = dense(source, resolved.dtype)
    model.generation_config = _generation(teacher)
    cast(nn.Module, model).to(resolved.device).requires_grad_(True)
    tokenizer = teacher.tokenizer() if teacher.has_tokenizer() else None
    return Student(model, tokenizer, source.manifest, checkpoint, teacher, words)


def of_export(folder: Path, kind: str, config: Config) -> Student:
    """An export as transformers reads it, with the adapters that lie beside it.

    Raises:
        ConfigError: transformers does not read it.
        UnavailableError: it has adapters, and PEFT is not installed.
        ArtifactError: a file is damaged.
    """
    if kind not in READ:
        raise ConfigError(
            f"{folder} is an export for {kind}, which transformers does not read: it reads {', '.join(READ)}"
        )
    manifest, resolved = open_artifact(folder).manifest, machine.resolve(config.instance)
    read = models.read(folder, "auto")
    if (adapters := folder / ADAPTER).is_dir():
        if find_spec("peft") is None:
            raise UnavailableError(f"{adapters} is put on the model by peft: run `{to_install('engines')}`")
        read.load_adapter(str(adapters))
    model = cast(nn.Module, read).to(resolved.device).eval()
    has_tokenizer = model_files.has_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **SAFE) if has_tokenizer else None
    return Student(cast(PreTrainedModel, model), tokenizer, manifest, folder)


def kind_of(folder: Path) -> str:
    """The format of the export in a folder; nothing where there is none.

    Raises:
        ArtifactError: what lies there cannot be read.
    """
    said = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    return str(said.get("format")) if said.get("kind") == exports.KIND else ""


def _generation(teacher: ModelFolder) -> GenerationConfig:
    """The defaults of the teacher's folder, with all tokens that end a text."""
    said = model_files.read(teacher.path / model_files.GENERATION)
    found = GenerationConfig.from_dict(said) if said else GenerationConfig.from_model_config(teacher.settings())
    found.eos_token_id = list(teacher.ends()) or None
    return found
