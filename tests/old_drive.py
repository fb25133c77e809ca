"""A Drive as the run log of the older scripts describes it: their archives, of the tiny model."""

import io
import json
import tarfile
from pathlib import Path

import torch

from qat.models import ModelFolder
from tests.checkpoints.conftest import Variant, write

CACHE = "alpaca_chat_think_both_L64_K64_R128"
FOUR = Variant(entries={"mlp": 16, "self_attn": 16}, others=False)
TWO = Variant(entries={"mlp": 4, "self_attn": 16}, others=False, seed=1)
LENGTH, TOP_K, RANDOM = 16, 8, 8


def fill(drive: Path, teacher: ModelFolder) -> None:
    """Everything that SR-001 of the log begins with, and the students after it."""
    runs, made = drive / "qwen3_runs", drive.parent / "made"
    runs.mkdir(parents=True)
    four = student(made / "four", teacher, FOUR, "anemll_v2_q4_a4_from_v1_finetuned.pt", 0.7312)
    pack(runs / "anemll_v2_q4_a4_from_v1_finetuned.tgz", four)
    two = student(made / "two", teacher, TWO, "model_state_dict.pt", 0.5341)
    pack(runs / "v2_a2_q2_best_fp32_0.5341.tgz", two, "v2_a2_q2_best_fp32_0.5341/v2_a2_q2_best_fp32_0.5341/")
    best = student(runs / "Q2A4_BINIT_0.5855", teacher, TWO, "best_state_dict.pt", 0.5855)
    (best / "last_state_dict.pt").write_bytes(b"of a later step")
    (drive / "qwen3_caches").mkdir()
    pack(drive / "qwen3_caches" / f"{CACHE}.tgz", cache(made / CACHE, teacher), f"{CACHE}/")


def student(folder: Path, teacher: ModelFolder, variant: Variant, name: str, loss: float) -> Path:
    """A V2 state dict with the `config.json` that tells its loss."""
    write(variant, teacher, folder / name)
    (folder / "config.json").write_text(json.dumps(variant.settings | {"final_loss": loss}))
    return folder


def cache(folder: Path, teacher: ModelFolder, rows: int = 48) -> Path:
    """Top-k logits of the teacher on random tokens, in two shards."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(teacher.vocab_size(), (rows, LENGTH), generator=draw)
    with torch.no_grad():
        logits = teacher.load(torch.float32, torch.device("cpu"))(ids).logits[:, :-1]
    top, best = logits.topk(TOP_K)
    sample = torch.randint(teacher.vocab_size(), (*best.shape[:2], RANDOM), generator=draw)
    tensors = {
        "input_ids": ids.int(),
        "attention_mask": torch.ones_like(ids, dtype=torch.uint8),
        "topk_idx": best.int(),
        "topk_logits": top.half(),
        "rand_idx": sample.int(),
        "rand_logits": logits.gather(-1, sample).half(),
    }
    for index, part in enumerate(torch.arange(rows).chunk(2)):
        torch.save({name: tensor[part].clone() for name, tensor in tensors.items()}, folder / f"shard_{index:05d}.pt")
    (folder / "meta.json").write_text(json.dumps({"format": "qwen_kd_topk_cache_v1", "teacher_model": teacher.name}))
    return folder


def pack(path: Path, folder: Path, below: str = "") -> None:
    """The files of a folder as an archive, at its top or below a folder of it; `.tgz` or `.tar.lz4`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if path.suffix == ".tgz" else "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, below + file.name)
    data = stream.getvalue()
    if path.suffix == ".lz4":
        import lz4.frame

        data = lz4.frame.compress(data)
    path.write_bytes(data)
