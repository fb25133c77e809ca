"""The names of a store: what each stands for in the configuration, in `outputs/` and in the store."""

import re
from pathlib import Path

from qat.config import CacheConfig, CheckpointConfig, Config, DataSource
from qat.store.archives import is_archive, stem
from qat.store.places import Entry

RUN = re.compile(r"SR-\d{3,}(-\d+)?")  # the second number: of several machines' runs of one number
KINDS = ("checkpoints", "caches", "runs")
MARKS = {  # what lies in the folder of each kind, ours or older
    "checkpoints": ("manifest.json", "*.pt", "*.safetensors"),
    "caches": ("meta.json", "shard_*.pt", "manifest.json"),
    "runs": ("result.json",),
}


def checkpoint_names(checkpoint: CheckpointConfig) -> list[str]:
    """What a registered checkpoint may be called in a store, its own name first; none for the teacher or a path."""
    if checkpoint.path or checkpoint.name in ("teacher", "local"):
        return []
    return list(dict.fromkeys(filter(None, (checkpoint.name, checkpoint.archive))))


def cache_name(config: Config) -> str | None:
    """The registered cache of a configuration: `alpaca_chat_think_both_L64_K64_R128`.

    Caches of other text are made from the configuration and keyed by content, so a name says too little.
    """
    cache, data = config.cache, config.data
    if cache.path or data.source is not DataSource.alpaca or data.path:
        return None
    return f"{data.name}_chat_think_{data.thinking}_{shape(cache)}"


def shape(cache: CacheConfig) -> str:
    """`L64_K64_R128`."""
    return f"L{cache.length}_K{cache.top_k}_R{cache.random}"


def kind_of(name: str) -> str:
    """The kind that a name given by itself has."""
    if RUN.fullmatch(name):
        return "runs"
    return "caches" if re.search(r"_L\d+_K\d+_R\d+", name) else "checkpoints"


def local_folder(outputs: Path, kind: str, name: str) -> Path:
    """Where what is pulled lies: `outputs/checkpoints/q4_fp32`, `outputs/caches/…`, `outputs/SR-007`."""
    return outputs / name if kind == "runs" else outputs / kind / name


def is_there(folder: Path, kind: str) -> bool:
    """True for a folder that holds what one of this kind does."""
    return folder.is_dir() and any(next(folder.glob(mark), None) for mark in MARKS[kind])


def find(entries: list[Entry], names: list[str]) -> Entry | None:
    """The archive or folder with one of these names: the likeliest name first, then the one nearest the top."""
    for name in names:
        for entry in entries:
            if (entry.size is None and entry.name == name) or (is_archive(entry.name) and stem(entry.name) == name):
                return entry
    return None


def known(entries: list[Entry]) -> list[str]:
    """Names that could be pulled."""
    archives = [stem(entry.name) for entry in entries if is_archive(entry.name)]
    folders = [entry.name for entry in entries if entry.size is None and entry.name not in KINDS]
    return sorted({*archives, *folders})
