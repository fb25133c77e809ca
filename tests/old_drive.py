"""A Drive as the run log of the older scripts describes it: their archives, of the tiny model."""

import json
import tarfile
from pathlib import Path

import torch

from qat.config import QuantConfig, WeightConfig
from qat.models import ModelFolder
from qat.quant.places import matrix
from tests import tiny
from tests.checkpoints.conftest import Variant, write

CACHE = "alpaca_chat_think_both_L64_K64_R128"
FOUR = QuantConfig(name="q4a4", mlp=WeightConfig(4, 8), attn=WeightConfig(4, 8))
LENGTH, TOP_K, RANDOM = 16, 8, 8


def fill(drive: Path, teacher: ModelFolder) -> None:
    """What SR-001 of the log begins with, and two of the students after it, each stored in another way."""
    runs, caches, made = drive / "qwen3_runs", drive / "qwen3_caches", drive.parent / "made"
    runs.mkdir(parents=True), caches.mkdir()
    pack(caches / f"{CACHE}.tgz", cache(made / CACHE, teacher), f"{CACHE}/")
    pack(runs / "anemll_v2_q4_a4_from_v1_finetuned.tgz", four(made / "four", teacher))
    two = student(made / "two", teacher, "model_state_dict.pt", 0.5341)
    pack(runs / "v2_a2_q2_best_fp32_0.5341.tar.gz", two, "v2_a2_q2_best_fp32_0.5341/v2_a2_q2_best_fp32_0.5341/")
    best = student(runs / "Q2A4_BINIT_0.5855", teacher, "best_state_dict.pt", 0.5855)
    (best / "last_state_dict.pt").write_bytes(b"of a later step")


def student(folder: Path, teacher: ModelFolder, name: str, loss: float) -> Path:
    """A V2 state dict of random codebooks, with the `config.json` that tells its loss."""
    write(Variant(), teacher, folder / name)
    (folder / "config.json").write_text(json.dumps({"version": "v2", "final_loss": loss}))
    return folder


def four(folder: Path, teacher: ModelFolder) -> Path:
    """A V2 state dict of four bits that is near the teacher: unit-norm scales, magnitudes, indices."""
    folder.mkdir(parents=True)
    model = teacher.load(torch.float32, tiny.CPU)
    state: dict[str, torch.Tensor] = {}
    rows = torch.randint(teacher.vocab_size(), (16, LENGTH), generator=torch.Generator().manual_seed(1))
    for name, (_, module, _) in tiny.converted(model, rows, quant=FOUR).items():
        parts = {{"codebook": "lut"}.get(part, part): value for part, value in module.normalized().items()}
        state |= {f"{name}.{part}": value.detach().clone() for part, value in parts.items()}
        state[f"{name}._indices"] = module.indices.long()
        state[f"{name}.weight"] = matrix(model, name).detach().clone()
    torch.save(state, folder / "anemll_v2_q4_a4_from_v1_finetuned.pt")
    (folder / "config.json").write_text(json.dumps({"version": "v2", "final_loss": 0.7312}))
    return folder


def cache(folder: Path, teacher: ModelFolder, rows: int = 192) -> Path:
    """Top-k logits of the teacher on random tokens, in two shards."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(7)
    ids = torch.randint(teacher.vocab_size(), (rows, LENGTH), generator=draw)
    with torch.no_grad():
        logits = teacher.load(torch.float32, tiny.CPU)(ids).logits[:, :-1]
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
    """The files of a folder as an archive, at its top or below a folder of it."""
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, below + file.name)
