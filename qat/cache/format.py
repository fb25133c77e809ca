"""The layout of a cache, which writer and reader agree on.

A cache is an artifact folder: `meta.json` and, for each split, safetensors shards of up to
`shard_rows` sequences (meta.json says how many) with

    input_ids        [N, L]       int32
    topk_ids         [N, L-1, K]  int32     most likely next tokens, descending
    topk_logprobs    [N, L-1, K]  float16   log-probabilities of the full softmax at T = 1
    random_logprobs  [N, L-1, R]  float16   the same of R tokens drawn uniformly from the vocabulary

Position p predicts token p + 1. What the top-k leaves out is the tail, 1 - Σ exp(topk_logprobs); the
random sample ("R" in the name) is an unbiased look into it. Its ids are not stored: `random_ids`
draws them again from the cache's seed.
"""

import torch

FORMAT_VERSION = 1
META = "meta.json"
SHARD_ROWS = 512


def shard_name(split: str, index: int) -> str:
    """File name of one shard."""
    return f"{split}-{index:05d}.safetensors"


def random_ids(seed: int, split: str, shard: int, shape: tuple[int, int, int], vocab_size: int) -> torch.Tensor:
    """Token ids [N, L-1, R] int64 of the random sample of one shard, the same on every machine."""
    return torch.randint(vocab_size, shape, generator=generator(seed, (shard << 1) + (split == "eval")))


def generator(seed: int, number: int) -> torch.Generator:
    """One generator for each number below a seed.

    torch reads the low 32 bits of a seed alone, so the two are mixed there; the factor is odd, so no
    two seeds of 32 bits share their first generator.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B9 + number) % 2**32)
