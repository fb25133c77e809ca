"""What a store calls things, and where what is pulled lies below `outputs/`."""

import re
from collections.abc import Callable
from pathlib import Path

from qat.checkpoint_files import STATE_DICTS
from qat.identities import RESULT, RUN
from qat.store.archives import is_archive, stem
from qat.store.places import Entry

KINDS = ("checkpoints", "caches", "runs")
MARKS = {  # files that mark a folder as one of each kind, in present and older layouts
    "checkpoints": ("manifest.json", "*.pt", "*.safetensors"),
    "caches": ("meta.json", "shard_*.pt", "manifest.json"),
    "runs": (RESULT,),
}


def fold(name: str) -> str:
    """A name as it is compared: `q2_0_5341` for `Q2_0.5341`."""
    return name.casefold().replace(".", "_")


def kind_of(name: str) -> str:
    """The kind that a name given by itself has."""
    if RUN.fullmatch(bare(name).rpartition("/")[2]):
        return "runs"
    return "caches" if re.search(r"_L\d+_K\d+_R\d+", name) else "checkpoints"


def local_folder(outputs: Path, kind: str, name: str) -> Path:
    """Where what is pulled lies: `outputs/checkpoints/q4_fp32`, `outputs/caches/…`, `outputs/SR-007`."""
    return outputs / name if kind == "runs" else outputs / kind / name


def is_there(folder: Path, kind: str) -> bool:
    """True for a folder that holds what one of this kind does."""
    return folder.is_dir() and any(next(folder.glob(mark), None) for mark in MARKS[kind])


def bare(path: str) -> str:
    """The path of a store's entry without its archive suffix: `runs/q4` for `runs/q4.tgz`."""
    return stem(path).removesuffix(".pt")


def own(entry: Entry) -> str:
    """The name of a store's entry; for a `best_state_dict.pt` the name of its folder."""
    folder = entry.path.rpartition("/")[0].rpartition("/")[2]
    return folder if folder and entry.name in STATE_DICTS else bare(entry.name)


def find(entries: list[Entry], names: list[str]) -> Entry | None:
    """What has one of these names or paths: the likeliest name first, as it is spelled, then what is nearest the top.

    It is a folder, an archive or a state dict.
    """
    spellings: tuple[Callable[[str], str], ...] = (str, fold)
    offered = [entry for entry in entries if is_offered(entry)]
    for name in names:
        for spelled in spellings:
            for entry in offered:
                if f"/{spelled(bare(entry.path))}".endswith(f"/{spelled(bare(name))}"):
                    return entry
    return None


def is_offered(entry: Entry) -> bool:
    """True for an entry that can be pulled."""
    return entry.size is None or is_archive(entry.name) or entry.name.endswith(".pt")


def known(entries: list[Entry]) -> list[str]:
    """Names that could be pulled."""
    archives = [stem(entry.name) for entry in entries if is_archive(entry.name)]
    folders = [entry.name for entry in entries if entry.size is None and entry.name not in KINDS]
    return sorted({*archives, *folders})
