"""Caches of the older scripts: `shard_*.pt` files of raw logits, with text of both splits in every shard.

They are read row by row where they lie: a shard is unpickled without its numbers (`weights_only`, on
fake tensors), which says where in the file each tensor begins. What they lack:

- a split: rows are held apart by a hash of their tokens, and a row that comes twice is taken once;
- the tail: only differences of raw logits are known. The mass outside the top-k can be estimated from
  the random sample, V times the mean of what it finds there, which is unbiased for every position.
"""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat import manifests, tensor_files
from qat.artifacts import Artifact, content_key, digests, obtain, read_json, require_space, write_json
from qat.cache.format import FORMAT_VERSION, META, SHARD_ROWS, bytes_a_row, encode_ids, shard_name, write_shard
from qat.cache.rows import Field, RowFile, RowFiles
from qat.config import Tail
from qat.data.documents import SPLITS, held_apart
from qat.errors import ArtifactError, ConfigError

log = logging.getLogger(__name__)

FORMAT = "pt"
SHARDS = "shard_*.pt"
NEEDED = ("input_ids", "topk_idx", "topk_logits")
SAMPLE = ("rand_idx", "rand_logits")
# Dimensions of each tensor, in letters, and the types it may have: N rows of L tokens, P = L - 1 positions, K and R
# tokens kept at each.
WHOLE = (torch.int16, torch.int32, torch.int64)
REAL = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = {
    "input_ids": ("NL", WHOLE),
    "topk_idx": ("NPK", WHOLE),
    "topk_logits": ("NPK", REAL),
    "rand_idx": ("NPR", WHOLE),
    "rand_logits": ("NPR", REAL),
    "attention_mask": ("NL", (torch.uint8, torch.bool, *WHOLE)),
}
REMEDY = "copy it again from where it came"


def open_older(folder: Path, vocab_size: int, eval_fraction: float, tail: Tail) -> Artifact:
    """A folder of older shards as something that a `CacheReader` reads.

    Args:
        folder: where they lie.
        vocab_size: of the model in hand.
        eval_fraction: share of the rows held apart.
        tail: `estimate` turns logits into log-probabilities by the random sample.

    Raises:
        ArtifactError: a shard cannot be read, or holds something else.
        ConfigError: a split would be empty, or there is no sample to estimate from.
    """
    paths = sorted(folder.glob(SHARDS))
    described = described_as(folder)
    shape = {"vocab_size": vocab_size, "eval_fraction": eval_fraction, "tail": tail.name}
    key = content_key({"files": digests(folder, [path.name for path in paths]), **shape})
    files = [_file(path) for path in paths]
    fields = files[0].fields
    if tail is Tail.estimate and SAMPLE[0] not in fields:
        raise ConfigError(f"cache.tail=estimate needs a random sample and {folder} has none: use loss=topk_kl")
    manifest: dict[str, Any] = {
        "kind": "caches",
        "format": FORMAT,
        "key": key,
        "teacher": {"name": described.get("teacher_model"), "fingerprint": None},
        "length": fields["input_ids"].shape[0],
        "top_k": fields["topk_idx"].shape[1],
        "random": fields[SAMPLE[0]].shape[1] if SAMPLE[0] in fields else 0,
        "vocab_size": vocab_size,
        "packing": "plain",  # joined documents attend to each other in these caches
        "tail": "estimated" if tail is Tail.estimate else "missing",
        "eval_fraction": eval_fraction,
    }
    artifact = Artifact(folder, manifest)
    manifest["sequences"] = {split: len(rows) for split, rows in OlderShards(artifact, "train").splits.items()}
    for split, count in manifest["sequences"].items():
        if not count:
            raise ConfigError(f"{folder} has no row for the {split} split: change data.eval_fraction")
    return artifact


class OlderShards:
    """Rows of one split.

    Attributes:
        rows: how many.
        splits: numbers of the rows of both splits.
        repeated: rows that came before already.
    """

    def __init__(self, cache: Artifact, split: str) -> None:
        """Reads the headers and all token ids."""
        self.meta = cache.manifest
        paths = sorted(cache.folder.glob(SHARDS))
        files = [_file(path) for path in paths]
        for path, file in zip(paths, files, strict=True):
            if _signature(file) != _signature(files[0]):
                raise ArtifactError(f"{path} has other tensors than {paths[0].name}: the folder mixes two caches")
        self._names = [name for name in (*NEEDED, *SAMPLE) if name in files[0].fields]
        if self.meta["tail"] != "estimated":
            self._names = list(NEEDED)
        bare = [RowFile(f.path, f.rows, {name: f.fields[name] for name in self._names}) for f in files]
        self._files = RowFiles(bare)
        self._loss_mask = torch.cat([_counts(file) for file in files])
        self.splits, self.repeated = self._split(cache.folder)
        self._numbers = self.splits[split]
        self.rows = len(self._numbers)

    def read(self, rows: Tensor, pinned: bool = False) -> dict[str, Tensor]:
        """The tensors of `format.READ` of these rows [B]; ids int32, and whatever takes the place of log-probabilities.

        Raises:
            ArtifactError: a token that the model does not have.
        """
        numbers = self._numbers[rows]
        found = self._files.read(numbers, self._names)
        ids, logits = found["topk_idx"].int(), found["topk_logits"]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.meta["vocab_size"]:
            raise ArtifactError(f"a shard has token {int(ids.max())}, the model only {self.meta['vocab_size']}")
        if self.meta["tail"] == "estimated":
            logits = estimated(ids, logits, found["rand_idx"], found["rand_logits"], self.meta["vocab_size"])
            if not (fine := logits.isfinite().flatten(1).all(1)).all():
                where = self._files.place(int(numbers[~fine][0]))
                raise ArtifactError(f"the random sample of {where} holds numbers that are none: use cache.tail=exact")
        starts = torch.zeros(found["input_ids"].shape, dtype=torch.uint8)
        starts[:, :1] = 1
        stored = {
            "input_ids": found["input_ids"].int(),
            "document_starts": starts,
            "loss_mask": self._loss_mask[numbers],
            "topk_ids": ids,
            "topk_logprobs": logits,
        }
        return {name: tensor.pin_memory() for name, tensor in stored.items()} if pinned else stored

    def place(self, row: int) -> str:
        """Where a row lies, for a person."""
        return self._files.place(int(self._numbers[row]))

    def input_ids(self, rows: Tensor) -> Tensor:
        """Token ids [B, L] alone."""
        return self._files.read(self._numbers[rows], ["input_ids"])["input_ids"]

    def _split(self, folder: Path) -> tuple[dict[str, Tensor], int]:
        """Row numbers of each split; a row whose tokens came before is in none."""
        seen: set[bytes] = set()
        chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
        for numbers in torch.arange(self._files.rows).split(1024):
            ids = self._files.read(numbers, ["input_ids"])["input_ids"].int()
            if int(ids.max()) >= self.meta["vocab_size"] or int(ids.min()) < 0:
                raise ArtifactError(
                    f"{folder} has token {int(ids.max())} and the model only {self.meta['vocab_size']}: it was made"
                    f" with another teacher ({self.meta['teacher']['name'] or 'its meta.json does not say which'})"
                )
            for number, row in zip(numbers.tolist(), ids.numpy(), strict=True):
                digest = hashlib.sha256(row.astype("<i4").tobytes()).digest()
                if digest not in seen:
                    seen.add(digest)
                    chosen["eval" if held_apart(digest, self.meta["eval_fraction"]) else "train"].append(number)
        return {split: torch.tensor(rows, dtype=torch.long) for split, rows in chosen.items()}, (
            self._files.rows - len(seen)
        )


def estimated(ids_K: Tensor, logits_K: Tensor, sample_R: Tensor, sample_logits_R: Tensor, vocab_size: int) -> Tensor:
    """Log-probabilities [..., K] fp32 of the top-k, with the sum over all other tokens estimated.

    The sample is drawn uniformly from the whole vocabulary: V times the mean of exp(logit), counting
    those outside the top-k alone, has the sum over them as its expectation.
    """
    top, sample = logits_K.float(), sample_logits_R.float()
    ordered = ids_K.long().sort(-1).values
    near = torch.searchsorted(ordered, sample_R.long().contiguous()).clamp_max(ordered.shape[-1] - 1)
    inside = ordered.gather(-1, near) == sample_R
    outside = torch.where(inside, -torch.inf, sample) + np.log(vocab_size / sample.shape[-1])
    return top - torch.cat([top, outside], -1).logsumexp(-1, keepdim=True)


def import_older(older: Artifact, artifacts: Path) -> Artifact:
    """The same cache in this project's format, without the random sample, of which only the estimate is kept.

    Without an estimate `topk_logprobs` holds the raw logits as they were, and `tail` says `missing`.
    """
    meta = older.manifest
    bare = re.sub(r"(_L\d+)?(_K\d+)?(_R\d+)?$", "", older.folder.name)
    name = f"{bare}_L{meta['length']}_K{meta['top_k']}_R0"
    described = {
        key: meta[key]
        for key in ("teacher", "length", "top_k", "vocab_size", "packing", "tail", "eval_fraction", "sequences")
    } | {"format": FORMAT_VERSION, "random": 0, "seed": 0, "shard_rows": SHARD_ROWS, "imported": older.folder.name}
    inputs = {"format": FORMAT_VERSION, "imported": older.key}

    def make(scratch: Path) -> dict[str, Any]:
        needed = sum(rows * bytes_a_row(described, split) for split, rows in meta["sequences"].items())
        require_space(scratch, needed, f"the import of {older.folder}")
        for split in SPLITS:
            source = OlderShards(older, split)
            for index, rows in enumerate(torch.arange(source.rows).split(SHARD_ROWS)):
                tensors = source.read(rows)
                tensors |= encode_ids(tensors["topk_ids"], meta["vocab_size"])
                tensors["topk_logprobs"] = tensors["topk_logprobs"].half()
                write_shard(scratch, shard_name(split, index), tensors, content_key(inputs))
        log.info("%d rows of %s came twice and are kept once", source.repeated, older.folder)
        write_json(scratch / META, described)
        return described

    return obtain(artifacts, "caches", name, inputs, make)


def described_as(folder: Path) -> dict[str, Any]:
    """Its meta.json, which may be missing.

    Raises:
        ArtifactError: it cannot be read, or names another format.
    """
    found = read_json(folder / META)
    try:
        manifests.OLDER_META(found, "")
    except manifests.Wrong as wrong:
        raise ArtifactError(f"{folder / META} describes no cache ({wrong}): mend or remove it") from None
    if found.get("format", "qwen_kd_topk_cache_v1") != "qwen_kd_topk_cache_v1":
        raise ArtifactError(f"{folder / META} describes no cache of the older scripts (qwen_kd_topk_cache_v1)")
    return found


def _file(path: Path) -> RowFile:
    """Where the tensors of a shard lie in its file, without reading them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            content = tensor_files.unpickled(path)
    except ValueError as error:
        raise ArtifactError(f"{path} is no shard, or not all of one ({error}): {REMEDY}") from None
    missing = [name for name in NEEDED if not isinstance(content, dict) or not tensor_files.is_plain(content.get(name))]
    if missing:
        raise ArtifactError(f"{path} holds no {' and no '.join(missing)}, so it is no shard of a teacher cache")
    tensors = {name: content[name] for name in SHAPES if tensor_files.is_plain(content.get(name))}
    if content["input_ids"].ndim == 1:  # one sequence, without the leading dimension
        tensors = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor, sizes)
    if SAMPLE[0] in tensors and SAMPLE[1] not in tensors:
        raise ArtifactError(f"{path} holds {SAMPLE[0]} without {SAMPLE[1]}: {REMEDY}")
    return RowFile(path, sizes["N"], {name: _field(tensor) for name, tensor in tensors.items()})


def _check_tensor(path: Path, name: str, tensor: Tensor, sizes: dict[str, int]) -> None:
    """Looks at type, shape and place of a tensor; `sizes` are those of the letters so far, and get its own."""
    letters, types = SHAPES[name]
    given = dict(zip(letters, tensor.shape, strict=False))
    fits = tensor.ndim == len(letters) and all(sizes.get(letter, size) == size for letter, size in given.items())
    if not (fits and tensor.is_contiguous()):
        beside = f" beside {sizes['N']} rows of {sizes['L']} tokens" if sizes else ""
        raise ArtifactError(f"{path}: {name} has shape {list(tensor.shape)}{beside}: {REMEDY}")
    if not tensor.numel() or given.get("L", 2) < 2:
        raise ArtifactError(f"{path}: {name} has shape {list(tensor.shape)}, in which there is nothing: {REMEDY}")
    if tensor.dtype not in types:
        raise ArtifactError(f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}: {REMEDY}")
    if tensor.untyped_storage()._checkpoint_offset is None:
        raise ArtifactError(f"{path} is in torch's file format of before 1.6: load it and torch.save it again")
    field = _field(tensor)
    if not 0 <= field.offset <= path.stat().st_size - tensor.shape[0] * field.row_bytes:
        raise ArtifactError(f"{path}: {name} goes on behind the end of the file: {REMEDY}")
    sizes |= given | ({"P": given["L"] - 1} if "L" in given else {})


def _field(tensor: Tensor) -> Field:
    start = int(tensor.untyped_storage()._checkpoint_offset)  # type: ignore[arg-type]
    return Field(tensor.dtype, tuple(tensor.shape[1:]), start + int(tensor.storage_offset()) * tensor.element_size())


def _signature(file: RowFile) -> dict[str, Any]:
    return {name: (f.dtype, f.shape) for name, f in file.fields.items() if name != "attention_mask"}


def _counts(file: RowFile) -> Tensor:
    """The loss mask [N, L-1] uint8 of a shard: both the position and what it predicts are text."""
    length = file.fields["input_ids"].shape[0]
    if "attention_mask" not in file.fields:
        return torch.ones(file.rows, length - 1, dtype=torch.uint8)
    mask = RowFiles([file]).read(torch.arange(file.rows), ["attention_mask"])["attention_mask"].bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ArtifactError(f"{file.path} has rows that are padded in front, which the older scripts never made")
    return (mask[:, 1:] & mask[:, :-1]).to(torch.uint8)
