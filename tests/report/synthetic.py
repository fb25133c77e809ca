"""Outputs folders full of runs that never ran, for pages and logs that must show hundreds."""

import json
import math
import random
from pathlib import Path

PRESETS = {"q2a4": 3.56, "q2a4_r8": 2.72, "q2a4_r4": 2.55, "q3a4_r8": 3.61, "q4a4": 4.21, "q2a2": 3.22}
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GOALS = ("find the rate", "does rank 8 suffice?", "longer training", "repeat of SR-003 on another machine", "")
PROMPTS = ("What is the capital of France?", "Explain in two sentences why the sky is blue.")


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def fill(outputs: Path, count: int, steps: int = 40, **words: str) -> None:
    """`count` runs, some in a sweep, some failed; `words` replaces goal and notes of every run."""
    dice = random.Random(0)
    for preset in PRESETS:
        write(
            outputs / "artifacts" / "checkpoints" / f"tiny_{preset}_init-abc" / "manifest.json", _manifest(preset, dice)
        )
    cache = {"name": "L64", "files": {}, "sequences": {"train": 300, "eval": 40}}
    write(outputs / "artifacts" / "caches" / "L64-abc" / "manifest.json", cache)
    for number in range(1, count + 1):
        place = f"sweep-001/SR-{number:03d}" if number % 5 == 0 else f"SR-{number:03d}"
        _run(outputs / place, number, dice, steps, words)


def _manifest(preset: str, dice: random.Random) -> dict:
    base = 0.6 / PRESETS[preset] ** 2
    figures = {
        f"model.layers.{depth}.{leaf}": {
            "output_error": base * (0.4 + LEAVES.index(leaf) / 9) * dice.uniform(0.8, 1.25)
        }
        for depth in range(30)
        for leaf in LEAVES
    }
    return {"name": f"tiny_{preset}_init", "files": {}, "figures": figures}


def _run(folder: Path, number: int, dice: random.Random, steps: int, words: dict[str, str]) -> None:
    preset = dice.choice(list(PRESETS))
    lr = dice.choice([3e-4, 1e-3, 3e-3])
    status = "failed" if number % 17 == 0 else "interrupted" if number % 23 == 0 else "complete"
    start = 14 / PRESETS[preset] ** 2
    end = start * dice.uniform(0.55, 0.8)
    goal = words.get("goal", dice.choice(GOALS))
    notes = words.get("notes", "")
    result = {
        "schema": 1,
        "run_id": f"SR-{number:03d}",
        "name": words.get("name", f"v2_{preset}_mlp_{end:.2f}_fp32"),
        "stage": "run",
        "status": status,
        "goal": goal,
        "notes": notes,
        "command": f"python launch.py quant={preset} train.lr={lr} run.goal='{goal}'",
        "overrides": [f"quant={preset}", f"train.lr={lr}"],
        "config": {
            "seed": 0,
            "quant": {"name": preset},
            "train": {"lr": lr, "steps": steps, "batch_size": 16},
            "cache": {"name": "L64"},
            "checkpoint": {"name": "teacher", "path": None},
            "instance": {"name": "auto"},
        },
        "started": f"2026-11-{1 + number % 22:02d}T10:00:00+0000",
        "quant": {"preset": preset, "bits_per_weight": PRESETS[preset]},
        "metrics": {},
        "timing": {"total_s": 300 + number, "convert_s": 100.5},
        "throughput": {"tokens_per_second": 1234.5},
        "paths": {"conversion": f"/anywhere/artifacts/checkpoints/tiny_{preset}_init-abc"},
        "environment": {"device": "cpu, bfloat16", "machine": "x86_64", "threads": 2},
        "error": words.get("error", "no space left on the disk") if status == "failed" else None,
    }
    if status == "complete":
        result["metrics"] = {
            "kd_loss_initial": start,
            "kd_loss_final": end,
            "kd_loss_best": end,
            "kl_initial": start * 0.8,
            "kl": end * 0.75,
            "perplexity": 40 + 20 * end,
            "teacher_perplexity": 42.6,
            "top1_agreement": math.exp(-end / 2),
        }
    write(folder / "result.json", result)
    rows = [{"step": 0, "kd_loss": start}]
    for step in range(1, steps + 1):
        value = end + (start - end) * math.exp(-4 * step / steps)
        rows.append({"step": step, "loss": value * dice.uniform(0.85, 1.1), "lr": lr})
        if step % max(1, steps // 8) == 0:
            rows.append({"step": step, "kd_loss": value})
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    said = words.get("said", "Paris is the capital of France, and its largest city.")
    answers = "\n".join(f"**{name}**\n\n> {said}\n" for name in ("teacher", "converted", "distilled"))
    write(folder / "samples.md", "# Samples\n\n" + "\n".join(f"## {prompt}\n\n{answers}" for prompt in PROMPTS))
