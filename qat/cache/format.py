"""The layout of a cache, which writer and reader agree on.

A cache is an artifact folder: `meta.json` and, for each split, safetensors shards of up to
`shard_rows` rows (meta.json says how many) with

    input_ids        [N, L]        int32
    document_starts  [N, L]        uint8     1 where a document begins, also one that goes on from another row
    loss_mask        [N, L-1]      uint8     1 where the position counts
    answers          [N, L-1]      uint8     1 where the next token belongs to an answer, if meta.json has `answers`
    topk_ids         [N, L-1, K]   uint16    low 16 bits of the most likely next tokens, descending
    topk_ids_high    [N, L-1, H]   uint8     their other bits, where the vocabulary has more than 65,536 tokens
    topk_logprobs    [N, L-1, K]   float16   log-probabilities of the full softmax at T = 1
    random_logprobs  [N, L-1, R]   float16   the same of R tokens drawn uniformly from the vocabulary, where asked for

K and R are 0 in training shards where meta.json says that `train_targets` is false: their rows are text alone.
Nothing here reads the random sample (`cache.random`); format 2, which is read too, has it always.

Position p predicts token p + 1. It does not count where that token is padding or begins another
document. What the top-k leaves out is the tail, 1 - Σ exp(topk_logprobs); the random sample ("R" in the
name, "samples" in older logs) is an unbiased look into it. Its ids are not stored: `random_ids`
draws them again from the cache's seed.

The high bits take 1, 2, 4 or 8 bits a token, the least that hold the vocabulary: id k of a position is
in byte `k // n`, n tokens a byte, from the lowest bits up; H = ⌈K / n⌉.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qat import system
from qat.seeds import generator

FORMAT_VERSION = 3
READABLE = (2, FORMAT_VERSION)
META = "meta.json"
SHARD_ROWS = 1024
READ = ("input_ids", "document_starts", "loss_mask", "answers", "topk_ids", "topk_ids_high", "topk_logprobs")
LOW_BITS = 16


def shard_name(split: str, index: int) -> str:
    """File name of one shard."""
    return f"{split}-{index:05d}.safetensors"


def high_bits(vocab_size: int) -> int:
    """Bits of a token id above the lowest 16, as they are stored: 0, 1, 2, 4 or 8."""
    needed = (vocab_size - 1).bit_length() - LOW_BITS
    return next(bits for bits in (0, 1, 2, 4, 8) if bits >= needed)


def encode_ids(ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """The stored form of token ids [..., K]: `topk_ids` and, for a large vocabulary, `topk_ids_high`."""
    ids = ids.int()
    stored = {"topk_ids": (ids & 0xFFFF).to(torch.uint16)}
    bits = high_bits(vocab_size)
    if bits:
        a_byte = 8 // bits
        high = torch.nn.functional.pad(ids >> LOW_BITS, (0, -ids.shape[-1] % a_byte))
        high = high.unflatten(-1, (high.shape[-1] // a_byte, a_byte))
        stored["topk_ids_high"] = (high << _shifts(bits, ids)).sum(-1).to(torch.uint8)
    return stored


def decode_ids(low: Tensor, high: Tensor | None, vocab_size: int) -> Tensor:
    """Token ids [..., K] int64 of what `encode_ids` stored."""
    ids = low.long()
    if high is None:
        return ids
    bits = high_bits(vocab_size)
    above = (high.long().unsqueeze(-1) >> _shifts(bits, high)) & ((1 << bits) - 1)
    return ids + (above.flatten(-2)[..., : ids.shape[-1]] << LOW_BITS)


def kept(meta: dict[str, Any], split: str) -> tuple[int, int]:
    """Tokens kept at each position of a split: of the most likely ones, and of the random sample."""
    text_alone = split == "train" and not meta.get("train_targets", True)
    return (0, 0) if text_alone else (meta["top_k"], meta["random"])


def layout(meta: dict[str, Any], split: str) -> dict[str, tuple[str, list[int]]]:
    """Type, as safetensors writes it, and shape without the rows of every tensor of a split's shards."""
    length, (top_k, random) = meta["length"], kept(meta, split)
    bits = high_bits(meta["vocab_size"])
    found = {
        "input_ids": ("I32", [length]),
        "document_starts": ("U8", [length]),
        "loss_mask": ("U8", [length - 1]),
        "topk_ids": ("U16", [length - 1, top_k]),
        "topk_logprobs": ("F16", [length - 1, top_k]),
    }
    if meta.get("answers"):
        found["answers"] = ("U8", [length - 1])
    if random or meta["format"] < FORMAT_VERSION:
        found["random_logprobs"] = ("F16", [length - 1, random])
    if bits:
        found["topk_ids_high"] = ("U8", [length - 1, -(-top_k * bits // 8)])
    return found


def bytes_a_row(meta: dict[str, Any], split: str) -> int:
    """Bytes of one row in a shard of a split."""
    width = {"U8": 1, "U16": 2, "F16": 2, "I32": 4}
    return sum(width[kind] * torch.Size(shape).numel() for kind, shape in layout(meta, split).values())


def write_shard(folder: Path, name: str, tensors: dict[str, Tensor], key: str) -> None:
    """Publishes one shard of the cache with this key: its file is whole and on disk, or is not there."""
    scratch = folder / f".{name}.tmp"
    whole = {field: tensor.contiguous() for field, tensor in tensors.items()}
    save_file(whole, scratch, metadata={"shard": f"{key}/{name}"})  # several would come in any order
    system.flush(scratch)
    os.replace(scratch, folder / name)
    system.flush_names(folder)


def random_ids(seed: int, split: str, shard: int, shape: tuple[int, int, int], vocab_size: int) -> Tensor:
    """Token ids [N, L-1, R] int64 of the random sample of one shard, the same on every machine."""
    return torch.randint(vocab_size, shape, generator=generator(seed, (shard << 1) + (split == "eval")))


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, device=like.device)
