"""Checks and lists the files of a Hugging Face folder without torch, so that the command line can refuse a wrong one.

transformers looks for weights by a list of names and takes the first it finds; whatever else lies there does
not count. `weights` follows the same list, so that what is hashed and examined is what is loaded.
"""

from pathlib import Path
from typing import Any

from qat import json_objects
from qat.errors import ConfigError
from qat.packed import FILE as PACKED

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER = "adapter_config.json"
INDEX = ".index.json"
NAMES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
GENERATION = "generation_config.json"
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab*", "*.model", "tekken.json")
TEXT = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", GENERATION),
)
REMEDY = "copy or download it again"
LAYERS = 10_000  # maximum layers, more than any model has; transformers would build them one by one
HINTS = {
    PACKED: "a packed export of this project: name its teacher, and with checkpoint= the run that it was made from",
    "*.gguf": "{}, and GGUF files in a folder are not read: name the model that it was made from",
    "model_index.json": "a pipeline of diffusers, which writes no text",
    f"*{INDEX}": "{}, an index of files with names of their own: save the model with save_pretrained",
    "*.safetensors": "{}: save the model with save_pretrained",
    "*.bin": "{}: save the model with save_pretrained",
    "*.pth": "{}: convert the model to transformers' format",
    "*.msgpack": "weights for Flax: save the model for PyTorch",
    "*.h5": "weights for TensorFlow: save the model for PyTorch",
    f"*/{CONFIG}": "{} lies one folder deeper: name that folder",
}


def check(folder: Path) -> None:
    """Checks a model folder as far as possible without loading the model.

    Raises:
        ConfigError: it is no folder with a model that transformers loads by itself.
    """
    described = settings(folder)
    if (folder / ADAPTER).is_file():
        raise ConfigError(
            f"{folder} holds an adapter ({ADAPTER}) beside a model, and whether transformers applies it depends on"
            " what is installed: merge it (merge_and_unload of PEFT) or take the model's files into another folder"
        )
    refuse_code(described, folder / CONFIG)
    if not isinstance(described.get("model_type"), str):
        raise ConfigError(f"{folder / CONFIG} names no model_type, so nobody knows how to compute this model")
    refuse_endless(folder)
    weights(folder)


def settings(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}, {_instead(folder)}")
    return _json(folder / CONFIG)


def refuse_endless(folder: Path) -> None:
    """Refuses a `config.json` that asks for more layers than any model has, which transformers would build one by one.

    Raises:
        ConfigError: it does, or it cannot be read.
    """
    _refuse_endless(settings(folder), folder / CONFIG)


def refuse_code(described: dict[str, Any], path: Path) -> None:
    """Refuses a model or tokenizer that would have code of its own run.

    Raises:
        ConfigError: the settings in `path` name such code.
    """
    if code := described.get("auto_map"):
        raise ConfigError(
            f"{path} asks for code of its own (auto_map: {_listed(code)}), which is never run here: where transformers"
            " has the same itself, delete auto_map from that file"
        )


def weights(folder: Path) -> list[Path]:
    """The files that transformers reads weights from, by name.

    Raises:
        ConfigError: there are none, or one that the index names is missing.
    """
    named = settings(folder).get("transformers_weights")
    names = NAMES if named is None else (str(named),)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(f"{folder} holds no weights ({', '.join(names)}), {_instead(folder)}")
    if not found.name.endswith(INDEX):
        return [found]
    shards = _json(found).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ConfigError(f"{found} lists no files (weight_map): {REMEDY}")
    files = sorted({folder / name for name in shards.values()})
    for file in files:
        if not file.is_file() or file.parent != folder:
            raise ConfigError(f"{file.name} is not in {folder}, and {found.name} says that weights are in it: {REMEDY}")
    return files


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a vocabulary; a tokenizer's settings alone are not enough."""
    return any(file.is_file() for pattern in VOCABULARY for file in folder.glob(pattern))


def text(folder: Path) -> list[Path]:
    """The files that say how text is read and how it ends, by name."""
    return sorted({file for pattern in TEXT for file in folder.glob(pattern) if file.is_file()})


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file that need not be there; empty where it is not.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    return _json(path) if path.is_file() else {}


def _refuse_endless(described: dict[str, Any], path: Path) -> None:
    for name, value in described.items():
        if isinstance(value, dict):
            _refuse_endless(value, path)
        elif "layer" in name and isinstance(value, int) and value > LAYERS:
            raise ConfigError(f"{path} asks for {name}={value}, which no model has: {REMEDY}")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json_objects.read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): {REMEDY}") from None


def _listed(code: Any) -> str:
    """The modules that an `auto_map` names, each once."""
    classes = code.values() if isinstance(code, dict) else code if isinstance(code, list) else [code]
    flat = [name for entry in classes for name in (entry if isinstance(entry, list) else [entry])]
    return ", ".join(sorted({str(name).rpartition(".")[0] or str(name) for name in flat if name}))


def _instead(folder: Path) -> str:
    """What a folder holds that has no model in it, and what to do."""
    if not folder.is_dir():
        return "as there is no such folder"
    if (folder / ADAPTER).is_file():
        base = _json(folder / ADAPTER).get("base_model_name_or_path")
        return f"but an adapter of {base}: merge the two (merge_and_unload of PEFT) and name the merged model"
    for pattern, said in HINTS.items():
        if found := sorted(folder.glob(pattern)):
            return f"but {said.format(found[0].relative_to(folder).as_posix())}"
    return "so it is no model of transformers: save one there with save_pretrained"
