"""Runs the teacher over packed rows and records its outputs.

Shard by shard: while a GPU computes the next one, a thread copies the last one over and writes it.
Nothing in a shard depends on its neighbours or on when it was made, so a cache that was interrupted
and taken up again is the same, byte for byte.
"""

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.artifacts import (
    Artifact,
    content_key,
    hashed,
    obtain,
    open_artifact,
    partial,
    place,
    require_space,
    write_json,
)
from qat.cache.author import MADE_WITH, Author
from qat.cache.crew import CALL, Crew
from qat.cache.format import (
    FORMAT_VERSION,
    META,
    SHARD_ROWS,
    bytes_a_row,
    encode_ids,
    kept,
    random_ids,
    shard_name,
    write_shard,
)
from qat.cache.topk import outputs
from qat.cache.values import checked
from qat.config import CacheConfig, Packing
from qat.console import Advance, progress
from qat.data.documents import SPLITS, read_documents
from qat.data.packing import Rows, pack
from qat.errors import ConfigError, NumericsError
from qat.fidelity import Sample
from qat.finite import finite
from qat.forward import Pass
from qat.head import OutputHead
from qat.machine import Machine
from qat.models import ModelFolder
from qat.models.streamed import each_hidden
from qat.provenance import NOTE
from qat.rows import inputs
from qat.threads import InTurn, beside

log = logging.getLogger(__name__)

LOOKED_AT = 1024  # documents from which rows are taken to test how the teacher is best computed
# Positions that are multiplied with the head at one time (enough to be worth reading all its weights), and
# positions whose fp32 log-probabilities are held at one time (few on a CPU, so that they fit its cache).
POSITIONS = {"cpu": (256, 32), "cuda": (2048, 2048)}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shard:
    """One shard to write: what it is a part of, its rows, and how many tokens are kept at their positions.

    Without any it holds text alone, and the teacher has nothing to do.
    """

    split: str
    index: int
    rows: Rows
    top_k: int
    random: int

    @property
    def name(self) -> str:
        """The shard's file."""
        return shard_name(self.split, self.index)


def obtain_cache(
    cache: CacheConfig,
    documents: Artifact,
    name: str,
    teacher: ModelFolder,
    seed: int,
    machine: Machine,
    artifacts: Path,
    whole: bool = True,
) -> Artifact:
    """The teacher's outputs on these documents, as an artifact.

    With `whole` the teacher may be in memory as a whole; else, and where it has little room, it is read layer by layer.
    Documents get rows of their own where the teacher would mix those that share one; meta.json's `packing` says so.

    Raises:
        ConfigError: a split has too little text for one row, or the teacher cannot be computed as it is by itself.
        MissingError: the disk is too small.
        NumericsError: the teacher's output is not finite.
    """
    key = {
        "format": FORMAT_VERSION,
        "teacher": teacher.fingerprint,
        "documents": documents.key,
        "length": cache.length,
        "top_k": cache.top_k,
        "random": cache.random,
        "packing": cache.packing.name,
        "sequences": cache.sequences,
        "seed": seed,
    }
    full_name = f"{name}_L{cache.length}_K{cache.top_k}_R{cache.random}"
    if not cache.train_targets:
        key, full_name = key | {"train_targets": False}, f"{full_name}_text"
    folder, crew = place(artifacts, "caches", full_name, key), Crew.here()
    author = Author(teacher, machine, crew, whole)

    def make(scratch: Path) -> dict[str, Any]:
        """The part of the first process (usually the only one), which holds the lock."""
        sample = _sample(cache, documents, teacher)
        how = author.settle(scratch, sample)
        meta, shards = _plan(cache, documents, teacher, seed, how)
        _prepare(scratch, meta, shards, author.noted(scratch), author.made_with(how, _tokens(shards)))
        crew.call(scratch)
        _record(meta, shards, content_key(key), author, how, sample, scratch)
        crew.wait(lambda: all((scratch / shard.name).exists() for shard in shards), "the other processes write shards")
        for note in (MADE_WITH, CALL):
            (scratch / note).unlink(missing_ok=True)
        checksums = hashed([scratch / shard.name for shard in shards])
        described = {shard.name: digest for shard, digest in zip(shards, checksums, strict=True)}
        write_json(scratch / META, meta | {"checksums": described})
        return meta

    def help_make(scratch: Path) -> None:
        """The part of the other processes: they write their shards into the folder that the first one prepares."""
        how = Pass(**author.noted(scratch)["pass"])
        meta, shards = _plan(cache, documents, teacher, seed, how)
        _record(meta, shards, content_key(key), author, how, _sample(cache, documents, teacher), scratch, folder)

    if crew.ranks.first:
        return checked(obtain(artifacts, "caches", full_name, key, make, resumable=True, at=machine.place()))
    scratch = partial(folder)
    crew.wait(lambda: folder.exists() or crew.called(scratch), f"the first process prepares {folder}")
    if not folder.exists():
        help_make(scratch)
    crew.wait(folder.exists, f"the first process publishes {folder}")
    return checked(open_artifact(folder))


def _sample(cache: CacheConfig, documents: Artifact, teacher: ModelFolder) -> Sample:
    """Rows from the beginning of both splits to look at the teacher on."""
    pad, joined = _pad(teacher), cache.packing is Packing.joined
    rows = []
    for split in SPLITS:
        some = islice(read_documents(documents, split), LOOKED_AT)
        beginning = pack(some, cache.length, cache.packing, pad)
        rows.append(beginning if len(beginning) else _rows(cache, documents, split, pad))
    ids, mask, starts = (
        torch.cat([getattr(part, name) for part in rows]) for name in ("input_ids", "loss_mask", "document_starts")
    )
    return Sample.of(ids, mask, starts if joined else None, pad)


def _plan(
    cache: CacheConfig, documents: Artifact, teacher: ModelFolder, seed: int, how: Pass
) -> tuple[dict[str, Any], list[Shard]]:
    """The description of the cache (its `meta.json`), and its shards."""
    tokenizer = teacher.tokenizer()
    if not how.joined:
        cache = replace(cache, packing=Packing.rows)
    rows = {split: _rows(cache, documents, split, _pad(teacher)) for split in SPLITS}
    meta = {
        "format": FORMAT_VERSION,
        "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint},
        "tokenizer_sha256": _sha256(tokenizer.backend_tokenizer.to_str()),
        "template_sha256": _sha256(str(tokenizer.chat_template)),
        "vocab_size": teacher.vocab_size(),
        "documents": documents.key,
        "data": documents.manifest["inputs"],
        "length": cache.length,
        "top_k": cache.top_k,
        "random": cache.random,
        "train_targets": cache.train_targets,
        **({"answers": True} if "answers" in documents.manifest else {}),
        "packing": cache.packing.name,
        "pass": {"attention": how.attention, "product": how.product},
        "tail": "exact",
        "seed": seed,
        "shard_rows": SHARD_ROWS,
        "sequences": {split: len(found) for split, found in rows.items()},
        "positions": {split: int(found.loss_mask.sum()) for split, found in rows.items()},
        "document_starts": {split: int(found.document_starts.sum()) for split, found in rows.items()},
    }
    return meta, [
        Shard(split, index, part, *kept(meta, split))
        for split in SPLITS
        for index, part in enumerate(rows[split].split(SHARD_ROWS))
    ]


def _pad(teacher: ModelFolder) -> int:
    return int(teacher.tokenizer().pad_token_id)


def _rows(cache: CacheConfig, documents: Artifact, split: str, pad: int) -> Rows:
    rows = pack(read_documents(documents, split), cache.length, cache.packing, pad)
    if not len(rows):
        there = documents.manifest["tokens"]
        larger = "a larger data.eval_fraction" if split == "eval" else "a smaller data.eval_fraction"
        raise ConfigError(
            f"the {split} split has {there[split]:,} of the text's {sum(there.values()):,} tokens, less than one"
            f" sequence of cache.length={cache.length}: give more text, {larger} or a shorter cache.length"
        )
    return rows.first(cache.sequences) if split == "train" else rows


def _tokens(shards: list[Shard]) -> int:
    """Tokens that the teacher reads."""
    return sum(shard.rows.input_ids.numel() for shard in shards if shard.top_k)


def _prepare(
    scratch: Path, meta: dict[str, Any], shards: list[Shard], noted: dict[str, Any], made_with: dict[str, Any]
) -> None:
    """Keeps whole shards that were made in the same way, and looks for space for the rest."""
    there = [shard for shard in shards if (scratch / shard.name).exists()]
    if there and noted != made_with:
        log.info("%s was begun on another machine or with other settings of it: starting over", scratch)
        there = []
    names = {shard.name for shard in there}
    for path in scratch.iterdir():
        if path.name not in {*names, NOTE}:
            path.unlink()
    if there:
        log.info("going on with %d of %d shards that are there already", len(there), len(shards))
    missing = [shard for shard in shards if shard.name not in names]
    needed = sum(len(shard.rows) * bytes_a_row(meta, shard.split) for shard in missing)
    require_space(scratch, needed, f"the cache of {sum(len(s.rows) for s in shards):,} rows")
    write_json(scratch / MADE_WITH, made_with)


def _record(
    meta: dict[str, Any],
    shards: list[Shard],
    key: str,
    author: Author,
    how: Pass,
    sample: Sample,
    scratch: Path,
    published: Path | None = None,
) -> None:
    """Writes those of this process's shards that are missing in `scratch`, unless it was published meanwhile."""
    mine = [shard for number, shard in enumerate(shards) if author.crew.takes(number)]
    todo = [s for s in mine if not (scratch / s.name).exists() and not (published and published.exists())]
    if not todo:
        return
    model = author.ready(how, sample, _tokens(shards))
    rows_at_once, before = author.machine.micro_batch, None
    with (
        progress("teacher outputs", _tokens(mine), "tokens", there=_tokens(mine) - _tokens(todo)) as advance,
        beside(author.machine.device, 1, "shards") as writer,
    ):
        for shard in todo:
            recorded = record(model, shard, meta, rows_at_once, advance) if shard.top_k else _room(shard, CPU)
            if before is not None:
                before.result()
            answers = bool(meta.get("answers"))
            before = writer.submit(_write, shard, recorded, meta["vocab_size"], key, scratch, answers)
            if isinstance(writer, InTurn):
                before.result()  # nothing goes on beside it, so what is recorded need not wait in memory
    if before is not None:
        before.result()


@torch.inference_mode()
def record(
    model: PreTrainedModel, shard: Shard, meta: dict[str, Any], micro_batch: int, advance: Advance
) -> dict[str, Tensor]:
    """What is kept of the teacher's outputs on one shard, on the model's device, each [N·(L-1), …]."""
    rows, length, joined = shard.rows, meta["length"], meta["packing"] == Packing.joined.name
    shape = (len(rows), length - 1, shard.random)
    drawn = random_ids(meta["seed"], shard.split, shard.index, shape, meta["vocab_size"]).int()
    head, recorded, done = OutputHead(model), _room(shard, model.device), 0
    text = (_given(piece, joined, model.device) for piece in rows.split(micro_batch))
    for hidden, sample in zip(each_hidden(model, text), drawn.split(micro_batch), strict=True):
        for part in _outputs(head, hidden, sample.flatten(0, 1).to(model.device).long(), shard.top_k):
            for name, tensor in recorded.items():
                tensor[done : done + len(part[name])] = part[name]
            done += len(part["ids"])
        advance(len(sample) * length)
    return recorded


def _given(rows: Rows, joined: bool, device: torch.device) -> dict[str, Tensor]:
    """Arguments of a forward pass over some rows."""
    return inputs(rows.input_ids.to(device).long(), rows.document_starts.to(device) if joined else None)


def _room(shard: Shard, device: torch.device) -> dict[str, Tensor]:
    """The tensors that `record` fills, each [N·(L-1), …].

    They are whole from the start: on a CPU many small ones, kept between logits that come and go, would leave
    malloc holes that nothing fits into, 0.1 MB a position.
    """
    positions, few, drawn = shard.rows.loss_mask.numel(), shard.top_k, shard.random
    kept = {"ids": (few, torch.int64), "topk_logprobs": (few, torch.float16), "random_logprobs": (drawn, torch.float16)}
    return {name: torch.empty(positions, count, dtype=dtype, device=device) for name, (count, dtype) in kept.items()}


def _outputs(head: OutputHead, hidden_XD: Tensor, sample_XR: Tensor, top_k: int) -> Iterable[dict[str, Tensor]]:
    """The head and what is kept of it, a few positions at a time."""
    many, few = POSITIONS.get(hidden_XD.device.type, POSITIONS["cpu"])
    for hidden, drawn in zip(hidden_XD.split(many), sample_XR.split(many), strict=True):
        for logits, sample in zip(head.logits(hidden).split(few), drawn.split(few), strict=True):
            yield outputs(logits, sample, top_k)


def _write(
    shard: Shard, recorded: dict[str, Tensor], vocab_size: int, key: str, folder: Path, answers: bool = False
) -> None:
    """Copies what was recorded of a shard from the device and publishes it."""
    stored = encode_ids(recorded["ids"], vocab_size)
    kinds = ("topk_logprobs", "random_logprobs") if shard.random else ("topk_logprobs",)
    stored |= {name: recorded[name] for name in kinds}
    positions = shard.rows.loss_mask.shape[1]
    tensors = {
        name: tensor.cpu().reshape(len(shard.rows), positions, tensor.shape[-1]) for name, tensor in stored.items()
    }
    if not finite(tensors["topk_logprobs"]):
        raise NumericsError("the teacher's logits hold NaN or infinity: try instance.precision=fp32")
    names = ("input_ids", "document_starts", "loss_mask", *(("answers",) if answers else ()))
    tensors |= {name: getattr(shard.rows, name) for name in names}
    write_shard(folder, shard.name, tensors, key)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
