"""Is every architecture computed as it computes itself? Each in small, through the whole job.

    python benchmarks/architectures.py --outputs <folder> [--only NAME …]

A tiny model of every causal architecture of the installed transformers (`zoo.py`) goes through text, cache,
conversion at 4 bits, two steps of distillation and evaluation, through a cache with one document a row, through
evaluation of a text in windows, and writes text of its own. Either a job ends, and what it recorded is compared
with transformers' eager forward pass, each document or window alone, or it is refused in one sentence.

Each is measured in a process of its own and kept as JSON; those that are there already are not measured again.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import zoo
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qat import machine, plots  # noqa: F401 - imported once, before a process is forked for each architecture
from qat.artifacts import write_json
from qat.cache.format import decode_ids
from qat.cli.compose import Composer, typed
from qat.errors import QatError
from qat.models.tiny import byte_tokenizer
from qat.stages import run, run_job  # noqa: F401

LARGEST = 0.01  # difference of log-probabilities; rounding them to 16 bits alone gives 0.002 to 0.004
SECONDS = 300  # for one architecture
FAINT = 2**-11  # half a unit of a log-probability in 16 bits, relative to it; counted below -8
CONTEXT, STRIDE = 96, 48  # of evaluation windows
TEXT = 400  # tokens of them

SMALL = [
    "model=local",
    "instance=cpu",
    "tracker=none",
    "data.eval_fraction=0.3",
    "cache.length=64",
    "cache.top_k=16",
    "quant=q4a4",
    "quant.partial=true",
    "convert.calibration_tokens=512",
    "convert.rounds=1",
    "train.steps=2",
    "train.batch_size=4",
    "train.lr=1e-5",
    "evaluate.sample_tokens=2",
]


def main() -> None:
    """Measures what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", required=True, type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="model types")
    options = parser.parse_args()
    machine.matmul_flops = lambda _: 1e11  # nobody looks at the speed here, and it takes a second each time
    rows = []
    for name in options.only or zoo.architectures():
        kept = options.outputs / f"{name}.json"
        if not kept.exists():
            write_json(kept, in_a_process(name, options.outputs / name))
        rows.append(json.loads(kept.read_text()))
        print(line(rows[-1]), flush=True)
    print(summary(rows))
    sys.exit(any(row["wrong"] for row in rows))


def in_a_process(name: str, folder: Path) -> dict[str, Any]:
    """`measure` in a process that may die or hang."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    process = multiprocessing.get_context("fork").Process(target=write_measured, args=(name, folder))
    began = time.monotonic()
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    kept = folder / "row.json"
    lost = {"name": name, "made": True, "jobs": {}, "wrong": [f"no answer, see {folder / 'said'}"]}
    return (json.loads(kept.read_text()) if kept.exists() else lost) | {"seconds": round(time.monotonic() - began, 1)}


def write_measured(name: str, folder: Path) -> None:
    """`measure`, its answer and all that is said meanwhile into the folder."""
    with open(folder / "said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    write_json(folder / "row.json", measure(name, folder))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Everything about one architecture; `wrong` lists what is."""
    torch.set_num_threads(1)
    try:
        model = zoo.tiny(zoo.architectures()[name])
        model.save_pretrained(folder / "model")
    except Exception as error:  # of other people's code, which says what it cannot do
        return {"name": name, "made": False, "why": f"{type(error).__name__}: {first_line(error)}", "wrong": []}
    byte_tokenizer().save_pretrained(folder / "model")
    teacher = type(model).from_pretrained(  # AutoModelForCausalLM takes text models alone
        folder / "model", attn_implementation="eager", trust_remote_code=False
    ).eval()
    row = {"name": name, "made": True, "class": type(model).__name__, "jobs": examine(folder, teacher)}
    return row | {"wrong": [f"{job}: {what}" for job, found in row["jobs"].items() if (what := fault(found))]}


def examine(folder: Path, teacher: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What came of each job."""
    text, asked = write_text(folder / "text.txt"), questions(folder / "prompts.txt")
    read = ["data=text", f"data.path={text}"]
    found = {"run": job(folder, "run", *read)}
    if "cache" not in found["run"]:
        found["cache"] = job(folder, "cache", *read)
    if "cache" in first(found):
        windows = [f"evaluate.context={CONTEXT}", f"evaluate.stride={STRIDE}", f"evaluate.tokens={TEXT}"]
        written = ["data=prompts", f"data.path={asked}", "data.answer_tokens=24", "cache.length=32"]
        found["rows"] = job(folder, "cache", *read, "cache.packing=rows", "cache.length=128")
        found["windows"] = job(folder, "evaluate", f"evaluate.text={text}", *windows)
        found["generated"] = job(folder, "cache", *written)
    for made in found.values():
        if "cache" in made:
            made |= compared(teacher, Path(made["cache"]))
    if "perplexity" in found.get("windows", {}):
        found["windows"]["own_perplexity"] = perplexity(teacher, text)
    return found


def first(jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What came of the joined cache, in the whole job or alone."""
    return jobs.get("cache") or jobs.get("run", {})


def job(folder: Path, stage: str, *words: str) -> dict[str, Any]:
    """Runs one job and says what it left, or why it was refused."""
    outputs, here = folder / "outputs", folder / f"run-{stage}-{len(list(folder.glob('run-*')))}"
    here.mkdir()
    said = Said()
    logging.getLogger("qat").addHandler(said)
    logging.getLogger("qat").setLevel(logging.INFO)
    try:
        composed = Composer({}).compose([f"stage={stage}", *SMALL, f"model.path={folder / 'model'}", *words])
        config = typed(composed)
        config.outputs = str(outputs)
        run_job(config, here)
    except QatError as error:
        return {"refused": str(error), "said": said.lines}
    except Exception:
        return {"defect": traceback.format_exc(), "said": said.lines}
    finally:
        logging.getLogger("qat").removeHandler(said)
    result = json.loads((here / "result.json").read_text())
    found: dict[str, Any] = {"said": said.lines}
    if "cache" in result["paths"]:
        meta = json.loads((Path(result["paths"]["cache"]) / "meta.json").read_text())
        found |= {"cache": result["paths"]["cache"], "packing": meta["packing"], "pass": meta["pass"]}
    if "kl" in result["metrics"]:
        found |= {"kl": result["metrics"]["kl"], "perplexity": result["metrics"]["teacher_perplexity"]}
    if "dense" in result["quant"]:
        found["dense"] = result["quant"]["dense"]
    return found


class Said(logging.Handler):
    """Keeps what the job says of how its teacher is computed."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a line."""
        if record.name in ("qat.fidelity.trial", "qat.generation.settle"):
            self.lines.append(record.getMessage())


@torch.no_grad()
def compared(teacher: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """How far a cache is from the model's own forward pass over each document alone."""
    meta = json.loads((folder / "meta.json").read_text())
    data = load_file(folder / "eval-00000.safetensors")
    errors = []
    for row in range(min(8, len(data["input_ids"]))):
        ids, starts, counts = (data[name][row] for name in ("input_ids", "document_starts", "loss_mask"))
        tokens = decode_ids(data["topk_ids"][row], None, meta["vocab_size"])
        firsts = starts.nonzero()[:, 0].tolist() if meta["packing"] == "joined" else [0]
        ends = [*firsts[1:], len(ids) if meta["packing"] == "joined" else int(counts.sum()) + 1]
        for first, end in zip(firsts, ends, strict=True):
            if end - first > 1:
                own = teacher(ids[first:end].long()[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                kept = data["topk_logprobs"][row, first : end - 1]
                apart = (own.gather(1, tokens[first : end - 1]) - kept.float()).abs()
                errors.append((apart - FAINT * kept.float().abs().sub(8).clamp_min(0)).amax(1))
    errors = torch.cat(errors)
    return {"largest": float(errors.max()), "median": float(errors.median()), "positions": len(errors)}


@torch.no_grad()
def perplexity(teacher: PreTrainedModel, text: Path) -> float:
    """Of a text in windows by the model's own forward pass, each token scored once."""
    ids = torch.tensor(byte_tokenizer()(text.read_text())["input_ids"][:TEXT])
    total, count, reached = 0.0, 0, 1
    for first in range(0, len(ids), STRIDE):
        window = ids[first : first + CONTEXT]
        logprobs = teacher(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scored = logprobs.gather(1, window[1:, None])[reached - first - 1 :, 0]
        total, count, reached = total - float(scored.sum()), count + len(scored), first + len(window)
        if reached == len(ids):
            break
    return math.exp(total / count)


def fault(found: dict[str, Any]) -> str:
    """What is wrong with what came of a job; nothing of one that is right, or refused."""
    if "defect" in found:
        return str(found["defect"].strip().splitlines()[-1])
    if found.get("largest", 0.0) > LARGEST or math.isnan(found.get("largest", 0.0)):
        return f"log-probabilities are off by {found['largest']:.3g}"
    if "own_perplexity" in found and abs(math.log(found["perplexity"] / found["own_perplexity"])) > LARGEST:
        return f"perplexity {found['perplexity']:.4g} instead of {found['own_perplexity']:.4g}"
    return "" if found.get("kl", 0.0) < 1 else f"KL {found['kl']:.3g} at 4 bits"


def write_text(path: Path) -> Path:
    """Paragraphs of two to seventy letters and more, so that rows hold one document and several."""
    draw = torch.Generator().manual_seed(0)
    lengths = [2, 9, 30, 70, 5, 140, 18, 50, 3, 100, 12, 64] * 3
    letters = torch.randint(97, 123, (sum(lengths),), generator=draw).tolist()
    words = iter(bytes(letters).decode())
    path.write_text("\n\n".join("".join(next(words) for _ in range(length)) for length in lengths))
    return path


def questions(path: Path) -> Path:
    """Prompts of several lengths."""
    path.write_text("\n".join(f"Question {number}{' and more' * (number % 4)}?" for number in range(24)))
    return path


def first_line(error: Exception) -> str:
    """What an error says first."""
    return next(iter(str(error).strip().splitlines()), "")


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    name, jobs = f"{row['name']:24}", row.get("jobs", {})
    if not row["made"]:
        return f"{name} not made small: {row['why'][:150]}"
    told = [f"WRONG {what}" for what in row["wrong"]]
    if "refused" in first(jobs):
        return " ".join([name, f"refused: {first(jobs)['refused'][:170]}", *told])
    largest = max((found["largest"] for found in jobs.values() if "largest" in found), default=math.nan)
    whole = jobs.get("run", {})
    student = f"KL {whole['kl']:.1e}" if "kl" in whole else f"no student: {whole.get('refused', '')[:60]}"
    if left := sum(whole.get("dense", {}).values()):
        student += f", {left:.1%} dense"
    return " ".join([name, f"{way(first(jobs)):34} {largest:.4f}  {loop(jobs):20} {student}", *told])


def way(found: dict[str, Any]) -> str:
    """How an architecture is computed."""
    if "pass" not in found:
        return "-"
    attention, product = found["pass"]["attention"], found["pass"]["product"]
    own = [part for part, is_own in {"attention": attention == "eager", "head": not product}.items() if is_own]
    apart = ", one document a row" if found["packing"] == "rows" else ""
    return (f"own {' and '.join(own)}" if own else "fast") + apart


def loop(jobs: dict[str, dict[str, Any]]) -> str:
    """Which loop wrote its text."""
    written = jobs.get("generated", {})
    if "refused" in written:
        return "writes no text"
    return "transformers' loop" if any("text is written" in line for line in written.get("said", [])) else "fast loop"


def summary(rows: list[dict[str, Any]]) -> str:
    """Counts."""
    made = [row for row in rows if row["made"]]
    refused = [row for row in made if "refused" in first(row["jobs"])]
    wrong = [row for row in rows if row["wrong"]]
    seconds = sum(row["seconds"] for row in rows)
    students = [row["jobs"]["run"]["dense"] for row in made if "dense" in row["jobs"].get("run", {})]
    return (
        f"{len(rows)} architectures: {len(made) - len(refused)} computed, {len(refused)} refused,"
        f" {len(rows) - len(made)} not made small, {len(wrong)} wrong; {len(students)} have a student,"
        f" {sum(not dense for dense in students)} of these with nothing dense in the decoder;"
        f" {seconds / 60:.0f} minutes"
    )


if __name__ == "__main__":
    main()
