"""Manifests that say what theirs must, for tests in which nobody opens the files that they list."""

from typing import Any

FILES = {"tables.safetensors": {"bytes": 1, "sha256": "0" * 64}}
CODEBOOK = {"bits": 2, "rank": 4}
CACHE = {
    **{"kind": "caches", "files": FILES, "key": "0" * 12, "format": 3, "teacher": {"name": "t", "fingerprint": "t"}},
    **{"vocab_size": 512, "length": 8, "top_k": 4, "random": 0, "packing": "rows", "tail": "missing", "seed": 0},
    **{"shard_rows": 8, "sequences": {"train": 1, "eval": 1}},
}


def checkpoint(mlp: bool = True, attn: bool = True, **said: Any) -> dict[str, Any]:
    """Of a checkpoint with codebooks for these kinds of layers."""
    quant = {"name": "made", "mlp": CODEBOOK if mlp else None, "attn": CODEBOOK if attn else None}
    layers = {kind: {"kind": kind, "shape": [64, 64], **CODEBOOK} for kind in ("mlp", "attn") if quant[kind]}
    whose = {"kind": "checkpoint", "model": "tiny", "teacher": "t", "quant": quant, "files": FILES}
    return whose | {"bits_per_weight": 4.015625, "layers": layers} | said
