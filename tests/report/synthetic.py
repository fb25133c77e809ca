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


def fill(outputs: Path, count: int, steps: int = 40, sized: bool = False, **words: str) -> None:
    """`count` runs, some in a sweep, some failed, `sized` with files; `words` replaces goal and notes of every run."""
    dice = random.Random(0)
    for preset in PRESETS:
        write(
            outputs / "artifacts" / "checkpoints" / f"tiny_{preset}_init-abc" / "manifest.json", _manifest(preset, dice)
        )
    cache = {"name": "L64", "files": {}, "sequences": {"train": 300, "eval": 40}}
    write(outputs / "artifacts" / "caches" / "L64-abc" / "manifest.json", cache)
    for number in range(1, count + 1):
        place = f"sweep-001/SR-{number:03d}" if number % 5 == 0 else f"SR-{number:03d}"
        _run(outputs / place, number, dice, steps, words, sized)


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


def _run(
    folder: Path, number: int, dice: random.Random, steps: int, words: dict[str, str], sized: bool = False
) -> None:
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
        "quant": {"preset": preset, "bits_per_weight": PRESETS[preset]}
        | ({"file_bytes": int(PRESETS[preset] * 3e7)} if sized else {}),
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


# Megabytes of the packed file, full KL after conversion and after training, of a student of each preset.
STUDENTS = {
    "mb56": (56.0, 0.61, 0.169),
    "mb66": (66.0, 0.31, 0.089),
    "q2a4_r8": (94.9, 1.21, 0.283),
    "q2a4": (104.0, 0.85, 0.239),
    "q3a4_r8": (104.8, 0.29, 0.112),
    "q4a4": (112.4, 0.108, 0.048),
}
INSTANCES = {"cpu": ("cpu, bfloat16", 2, 900), "t4": ("Tesla T4, float16", 4, 160), "h200": ("NVIDIA H200", 16, 24)}
TEXTS = ("held-out text of L64", "wiki.txt, windows of 2,048 tokens, stride 2,048")


def varied(outputs: Path) -> int:
    """Some thirty runs of every kind, as a project has them after a week; returns how many."""
    dice = random.Random(1)
    cases = [(preset, seed, instance) for seed in range(2) for preset in STUDENTS for instance in ("cpu", "h200")]
    for number, (preset, seed, instance) in enumerate(cases, 1):
        place = f"sweep-001/SR-{number:03d}" if number > 20 else f"SR-{number:03d}"
        _student(outputs / place, number, preset, seed, instance, dice)
    write(outputs / "SR-003" / "wandb" / "offline-run-20261103_100000-a1b2c3d4" / "run-a1b2c3d4.wandb", "x")
    failed = {"status": "failed", "metrics": {}, "timing": {"total_s": 0.5}}
    full = "No space left on device in /data/outputs: 1.2 GB are needed and 300 MB are free"
    killed = {"status": "interrupted", "metrics": {"kd_loss_initial": 2.0}, "error": "stopped from the keyboard"}
    others = [
        _other(
            "convert", quant=_quant("q2a4"), metrics={"kl": 0.86, "kd_loss": 1.9, "perplexity": 95.0}, **_at("q2a4")
        ),
        _other("run", quant={"preset": "q3a4_r8"}, **failed | {"error": full}),
        _other("distill", quant={"preset": "q2a4"}, **failed | {"error": "checkpoint=SR-900: there is no such run"}),
        _other("run", quant=_quant("q4a4"), **killed | {"timing": {"total_s": 71.0, "convert_s": 55.0}}),
        _other("cache", paths={"cache": "/data/outputs/artifacts/caches/L64-abc"}),
        _other("evaluate", **_evaluated(TEXTS[1])),
        _other("evaluate", **_evaluated(TEXTS[0])),
        _other("export", **_exported("gguf", 98_400_000)),
        _other("export", **_exported("packed", 104_000_000)),
        _other("export", **failed | {"error": "export=mlx cannot write codebooks: use a preset of its own grid"}),
    ]
    cache = {"name": "L64", "files": {}, "sequences": {"train": 300, "eval": 40}}
    write(outputs / "artifacts" / "caches" / "L64-abc" / "manifest.json", cache)
    for number, result in enumerate(others, len(cases) + 1):
        write(outputs / f"SR-{number:03d}" / "result.json", result | {"run_id": f"SR-{number:03d}"})
    return len(cases) + len(others)


def _at(preset: str) -> dict:
    return {"paths": {"conversion": f"/data/outputs/artifacts/checkpoints/smollm2_135m_{preset}_init-alone"}}


def _quant(preset: str) -> dict:
    megabytes = STUDENTS[preset][0]
    bits = {"model_bits_per_weight": megabytes * 8 / 134.5, "bits_per_weight": PRESETS.get(preset, 3.1)}
    return {"preset": preset, "file_bytes": int(megabytes * 1e6), **bits}


def _ground(text: str) -> dict:
    return {"teacher": {"name": "smollm2_135m", "fingerprint": "f"}, "text": text[:6] * 4, "called": text}


def _student(folder: Path, number: int, preset: str, seed: int, instance: str, dice: random.Random) -> None:
    device, cores, seconds = INSTANCES[instance]
    _, start, end = (figure * dice.uniform(0.97, 1.03) for figure in STUDENTS[preset])
    conversion = f"smollm2_135m_{preset}_init-{seed}{instance}"
    where = {"instance": instance, "device": device, "cores": cores, "machine": "x86_64"}
    made = {"at": "2026-11-03T10:00:00+0000", "seconds": seconds * dice.uniform(0.9, 1.1), **where}
    manifest = _manifest("q2a4", dice) | {"name": conversion[: -len(instance) - 2], "made": made}
    write(
        folder.parents[folder.parent.name != "outputs"] / "artifacts/checkpoints" / conversion / "manifest.json",
        manifest,
    )
    _run(folder, number, dice, 40, {"notes": "loss still falls at the end" if number == 2 else ""})
    result = json.loads((folder / "result.json").read_text())
    figures = {"kl_initial": start, "kl": end, "kd_loss_initial": start * 2, "kd_loss_final": end * 2}
    figures |= {
        "kd_loss_best": end * 2,
        "perplexity": 11.9 * math.exp(end),
        "perplexity_initial": 11.9 * math.exp(start),
    }
    figures |= {"teacher_perplexity": 11.9, "top1_agreement": math.exp(-end)}
    models = {
        name: {"metrics": _metrics(kl)} for name, kl in (("converted", start), ("distilled", end), ("teacher", 0))
    }
    timing = {"cache_s": 12.5, "convert_s": made["seconds"], "distill_s": 250.0, "evaluate_s": 12.0, "total_s": 300.0}
    config = result["config"] | {"seed": seed, "quant": {"name": preset}, "instance": {"name": instance}}
    result |= {
        "name": f"v2_{preset}_mlp_{end * 2:.2f}_fp32",
        "status": "complete",
        "error": None,
        "command": f"python launch.py quant={preset} seed={seed} instance={instance} train.steps=2800",
        "overrides": [f"quant={preset}", f"seed={seed}", f"instance={instance}", "train.steps=2800"],
        "config": config | {"model": {"name": "smollm2_135m"}},
        "quant": _quant(preset),
        "metrics": figures,
        "timing": timing,
        "evaluation": {"models": models},
        "measured_on": _ground(TEXTS[seed]),
        "paths": {"conversion": f"/data/outputs/artifacts/checkpoints/{conversion}"},
        "environment": {"device": device, "cores": cores, "machine": "x86_64", "threads": cores, "instance": instance},
    }
    write(folder / "result.json", result)


def _metrics(kl: float) -> dict:
    return {"kl": kl, "kd_loss": kl * 2, "perplexity": 11.9 * math.exp(kl), "top1_agreement": math.exp(-kl)}


def _other(stage: str, **said: object) -> dict:
    """What a run of a stage that trains nothing says of itself, or one that came to nothing."""
    device, cores, _ = INSTANCES["cpu"]
    return {
        "schema": 1,
        "stage": stage,
        "name": "",
        "status": "complete",
        "command": f"python launch.py stage={stage}",
        "config": {"model": {"name": "smollm2_135m"}, "instance": {"name": "cpu"}, "checkpoint": {"name": "teacher"}},
        "started": "2026-11-24T09:00:00+0000",
        "measured_on": _ground(TEXTS[0]) if stage == "convert" else {},
        "timing": {"total_s": 42.0},
        "environment": {"device": device, "cores": cores, "instance": "cpu"},
        **said,
    }


def _evaluated(text: str) -> dict:
    figures = {"kl": 0.29, "perplexity": 15.2, "kl_64_128": 0.31, "kl_1024_2048": 0.27}
    models = {"SR-007": {}, "SR-008": {}, "teacher": {}}
    return {"metrics": figures, "evaluation": {"models": models, "on": text}, "measured_on": _ground(text)}


def _exported(form: str, size: int) -> dict:
    config = {"export": {"name": form}, "checkpoint": {"path": "outputs/SR-008/checkpoints/best"}}
    paths = {"export": f"exports/smollm2-{form}"}
    return {"config": config, "paths": paths, "memory": {"export_bytes": size}, "metrics": {"parity": 2.1e-4}}
