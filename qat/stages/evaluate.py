"""Stage 4: what the student is worth, in figures and in its own words."""

from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from qat import checkpoints
from qat.artifacts import Artifact, write_text
from qat.cache.reader import CacheReader
from qat.config import Config
from qat.console import table
from qat.errors import MissingError
from qat.evaluate import SAMPLE_PROMPTS, Metrics, answers, evaluate
from qat.quant.layers import summary
from qat.runs import Run
from qat.stages import cache
from qat.stages.workspace import Workspace, open_workspace, start_folder

SAMPLES = "samples.md"


def main(config: Config, run: Run) -> None:
    """`stage=evaluate`: measures a given checkpoint."""
    work = open_workspace(config, run)
    start = start_folder(config.checkpoint)
    if start is None:
        raise MissingError("stage=evaluate needs a quantized model: checkpoint=<path>")
    measured = make(work, cache.make(work), {"student": start})
    metrics = measured["student"]
    run.result["metrics"] |= asdict(metrics)
    rows = [
        ["full KL", f"{metrics.kl:.4f}"],
        ["KD loss", f"{metrics.kd_loss:.4f}"],
        ["perplexity", f"{metrics.perplexity:.2f}"],
        ["perplexity of the teacher", f"{metrics.teacher_perplexity:.2f}"],
        ["same first choice", f"{metrics.top1_agreement:.1%}"],
        ["bits per quantized weight", f"{run.result['quant']['bits_per_weight']:.2f}"],
    ]
    table(f"{start} on held-out text", ["figure", "value"], rows)


def make(
    work: Workspace, outputs: Artifact, folders: dict[str, Path], known: dict[str, Metrics] | None = None
) -> dict[str, Metrics]:
    """Measures each checkpoint on the held-apart split and writes `samples.md`.

    Args:
        work: the run.
        outputs: the cache.
        folders: what a person calls each checkpoint, and where it lies.
        known: what was measured before, on the same split.
    """
    machine, tokens = work.machine, work.config.evaluate.sample_tokens
    held_out, tokenizer = CacheReader(outputs, "eval"), work.teacher.tokenizer()
    measured, said = dict(known or {}), {}
    with work.timed("evaluate"):
        teacher = work.teacher.load(machine.dtype, machine.device)
        said["teacher"] = answers(teacher, tokenizer, SAMPLE_PROMPTS, tokens, machine)
        for name, folder in folders.items():
            student = _load(work, folder)
            if name not in measured:
                measured[name] = evaluate(student, teacher, held_out, int(held_out.meta["top_k"]), machine)
            said[name] = answers(student, tokenizer, SAMPLE_PROMPTS, tokens, machine)
        write_text(work.run.folder / SAMPLES, samples(said))
    work.run.result["paths"]["samples"] = str(work.run.folder / SAMPLES)
    return measured


def _load(work: Workspace, folder: Path) -> PreTrainedModel:
    student, manifest = checkpoints.load(folder, work.teacher, work.machine)
    work.run.result["quant"] = {
        "preset": manifest["quant"]["name"],
        **summary(checkpoints.layers_of(manifest)),
    }
    return student


def samples(said: dict[str, list[str]]) -> str:
    """The same prompts answered by each model, as Markdown."""
    parts = ["# The same prompts, answered by each model (most likely tokens, no sampling)\n"]
    for number, prompt in enumerate(SAMPLE_PROMPTS):
        parts.append(f"## {prompt}\n")
        for name, texts in said.items():
            quoted = "\n".join(f"> {line}" for line in texts[number].splitlines() or ["(nothing)"])
            parts.append(f"**{name}**\n\n{quoted}\n")
    return "\n".join(parts)
