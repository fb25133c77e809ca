"""What a cache says, looked at once for each of its files: whoever trains on it or measures by it trusts every number.

A checksum proves that a file is the one that was written, not that what was written can be learnt from.
"""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.artifacts import Artifact, digests, read_json, write_json
from qat.cache import older
from qat.cache.batch import Batch
from qat.cache.format import META, kept, shard_name
from qat.cache.reader import CacheReader
from qat.data.documents import SPLITS
from qat.errors import ArtifactError

AT_ONCE = 1 << 22  # top-k entries that are checked at one time
ABOVE_ZERO = 1e-3  # largest log-probability accepted: rounding may leave values slightly above 0


def checked(cache: Artifact) -> Artifact:
    """The same cache, after a check that all its values are possible outputs of a teacher.

    What was looked at is noted beside the folder under the files' checksums.

    Raises:
        ArtifactError: a token is none of the vocabulary, a number is none, or no position of a split counts; with
            the shard and the row.
    """
    if cache.manifest["format"] != older.FORMAT:
        _check_files(cache)
    note, known = cache.folder.parent / f".{cache.folder.name}.looked_at", _known(cache)
    if _noted(note) != known:
        raw = {"tail": "missing"} if cache.manifest["format"] == older.FORMAT else {}
        for split in () if cache.fresh else SPLITS:  # a cache made by this run was checked when it was written
            _look(replace(cache, manifest=cache.manifest | raw), split)
        with suppress(OSError):
            write_json(note, known)
    return cache


def _check_files(cache: Artifact) -> None:
    """Checks that files match the manifest's shards, and the manifest matches `meta.json`, which has a checksum."""
    meta, files = cache.manifest, cache.manifest["files"]
    counts = {split: -(-meta["sequences"][split] // meta["shard_rows"]) for split in SPLITS}
    shards = {shard_name(split, index) for split, count in counts.items() for index in range(min(count, len(files)))}
    if files.keys() != {META, *shards}:
        raise _damaged(cache, f"it lists {len(files)} files, and its rows are in {sum(counts.values())} shards")
    for key, value in read_json(cache.folder / META).items():
        if key != "checksums" and meta.get(key) != value:
            raise _damaged(cache, f"its manifest says something else of {key} than {META}")


def _look(cache: Artifact, split: str) -> None:
    reader, counted = CacheReader(cache, split), 0
    a_row = (reader.meta["length"] - 1) * max(1, kept(reader.meta, split)[0])
    for rows in reader.in_order(max(1, AT_ONCE // a_row)):
        batch = reader.batch(rows)
        for wrong, found_B in _faults(batch, reader.meta).items():
            if found_B.any():
                row = int(rows[found_B][0])
                raise _damaged(cache, f"{wrong} in {reader.place(row)}")
        counted += int(batch.loss_mask.sum())
    if not counted:
        raise _damaged(cache, f"no position of the {split} split counts, so there is nothing to learn or to measure")


def _faults(batch: Batch, meta: dict[str, Any]) -> dict[str, Tensor]:
    """Possible faults of rows, each with a mask [B] of the rows that have it."""
    vocabulary, logprobs = meta["vocab_size"], batch.topk_logprobs.flatten(1)
    faults = {
        "a token that the vocabulary lacks is": _outside(batch.input_ids, vocabulary),
        "a kept token that the vocabulary lacks is": _outside(batch.topk_ids.flatten(1), vocabulary),
        "NaN or infinity is among the log-probabilities": ~logprobs.isfinite().all(1),
        "the mask of what counts holds something else than 0 and 1": (batch.stored["loss_mask"] > 1).any(1),
        "the mask of where documents begin holds something else than 0 and 1": (
            batch.stored["document_starts"] > 1
        ).any(1),
    }
    if meta.get("answers"):
        faults["the mask of answers holds something else than 0 and 1"] = (batch.stored["answers"] > 1).any(1)
    if meta["tail"] != "missing":
        faults["a probability above 1 is"] = (logprobs > ABOVE_ZERO).any(1)
    return faults


def _outside(ids_BX: Tensor, vocabulary: int) -> Tensor:
    return ((ids_BX < 0) | (ids_BX >= vocabulary)).any(1)


def _damaged(cache: Artifact, why: str) -> ArtifactError:
    return ArtifactError(f"{cache.folder} cannot be used: {why}; record the cache again")


def _known(cache: Artifact) -> dict[str, Any]:
    """What identifies the numbers of a cache and the rules that they were looked at by."""
    shaping = [cache.manifest[key] for key in ("format", "vocab_size", "tail")]
    names = cache.manifest.get("files") or sorted(path.name for path in cache.folder.glob(older.SHARDS))
    return {"rules": 1, "of": shaping, "files": digests(cache.folder, names)}


def _noted(note: Path) -> Any:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
