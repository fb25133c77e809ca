"""Runs the teacher over packed sequences and records what it says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qat.artifacts import Artifact, obtain, write_json
from qat.cache.format import FORMAT_VERSION, META, SHARD_ROWS, random_ids, shard_name
from qat.config import CacheConfig
from qat.console import Advance, progress
from qat.data.documents import SPLITS, read_documents
from qat.data.packing import pack
from qat.errors import ConfigError, NumericsError
from qat.machine import Machine
from qat.models import ModelFolder


def obtain_cache(
    cache: CacheConfig,
    documents: Artifact,
    name: str,
    teacher: ModelFolder,
    seed: int,
    machine: Machine,
    artifacts: Path,
) -> Artifact:
    """The teacher's outputs on these documents, as an artifact.

    Raises:
        ConfigError: a split has too little text for one sequence.
        NumericsError: the teacher's output is not finite.
    """

    def make(folder: Path) -> dict[str, Any]:
        rows = {split: _rows(cache, documents, split) for split in SPLITS}
        meta: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint},
            "documents": documents.key,
            "length": cache.length,
            "top_k": cache.top_k,
            "random": cache.random,
            "seed": seed,
            "shard_rows": SHARD_ROWS,
            "sequences": {split: len(ids) for split, ids in rows.items()},
        }
        model = teacher.load(machine.dtype, machine.device)
        meta["vocab_size"] = model.config.vocab_size
        tokens = sum(ids.numel() for ids in rows.values())
        with progress("teacher outputs", tokens, "tokens") as advance:
            for split, ids in rows.items():
                for index, shard in enumerate(ids.split(SHARD_ROWS)):
                    sample = random_ids(
                        seed, split, index, (len(shard), cache.length - 1, cache.random), meta["vocab_size"]
                    )
                    save_file(
                        _record(model, shard, sample, cache, machine, advance),
                        folder / shard_name(split, index),
                    )
        write_json(folder / META, meta)
        return meta

    inputs = {
        "format": FORMAT_VERSION,
        "teacher": teacher.fingerprint,
        "documents": documents.key,
        "length": cache.length,
        "top_k": cache.top_k,
        "random": cache.random,
        "sequences": cache.sequences,
        "seed": seed,
    }
    full_name = f"{name}_L{cache.length}_K{cache.top_k}_R{cache.random}"
    return obtain(artifacts, "caches", full_name, inputs, make)


def _rows(cache: CacheConfig, documents: Artifact, split: str) -> torch.Tensor:
    rows = pack(read_documents(documents, split), cache.length)
    if not len(rows):
        raise ConfigError(
            f"the {split} split has less text than one sequence of cache.length={cache.length} tokens:"
            " give more text or shorten the sequences"
        )
    return rows[: cache.sequences] if split == "train" else rows


def _record(
    model: PreTrainedModel,
    rows: torch.Tensor,
    sample: torch.Tensor,
    cache: CacheConfig,
    machine: Machine,
    advance: Advance,
) -> dict[str, torch.Tensor]:
    """One shard: the tensors of `format`, computed a micro-batch at a time."""
    parts = list(_micro_batches(model, rows, sample, cache, machine, advance))
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return {"input_ids": rows.contiguous(), **tensors}


def _micro_batches(
    model: PreTrainedModel,
    rows: torch.Tensor,
    sample: torch.Tensor,
    cache: CacheConfig,
    machine: Machine,
    advance: Advance,
) -> Iterator[dict[str, torch.Tensor]]:
    for ids, drawn in zip(rows.split(machine.micro_batch), sample.split(machine.micro_batch), strict=True):
        with torch.inference_mode():
            logits = model(ids.to(machine.device)).logits[:, :-1]
            yield outputs(logits, drawn.to(machine.device), cache.top_k)
        advance(ids.numel())


def outputs(logits: torch.Tensor, sample: torch.Tensor, top_k: int) -> dict[str, torch.Tensor]:
    """What the cache keeps of logits [B, P, V] and drawn ids [B, P, R], on the CPU.

    Raises:
        NumericsError: a logit is NaN or infinite.
    """
    top, ids = logits.topk(top_k, dim=-1)
    log_sum = torch.logsumexp(logits.float(), dim=-1, keepdim=True)
    if not torch.isfinite(log_sum).all():
        raise NumericsError("the teacher's logits hold NaN or infinity: try instance.precision=fp32")
    return {
        "topk_ids": ids.int().cpu(),
        "topk_logprobs": (top.float() - log_sum).half().cpu(),
        "random_logprobs": (logits.gather(-1, sample).float() - log_sum).half().cpu(),
    }
