"""The whole job: cache, convert, distill, evaluate; existing results are used again."""

from pathlib import Path

from qat import checkpoints
from qat.artifacts import Artifact
from qat.config import ROLES, Config, LossKind
from qat.console import duration, facts, table
from qat.evaluate import Metrics
from qat.processes import place
from qat.quant.architectures import told
from qat.quant.size import said
from qat.runs import Run
from qat.shown import near
from qat.stages import cache, convert, distill, evaluate, first
from qat.stages.onward import onward
from qat.stages.workspace import Workspace, open_workspace, start_folder

STAGES = ("cache", "convert", "distill", "evaluate")


def main(config: Config, run: Run) -> None:
    """`stage=run`."""
    work = open_workspace(config, run)
    cached = cache.make(work)
    start, known = _start(work, cached)
    best = distill.make(work, cached, start)
    if not place().first:
        return  # the remaining work is done by one process
    measured = evaluate.make(work, cached, {"converted": start, "distilled": best}, known)
    before, after = measured["converted"], measured["distilled"]
    run.result["metrics"] |= {
        "kl_initial": before.kl,
        "kl": after.kl,
        "perplexity_initial": before.perplexity,
        "perplexity": after.perplexity,
        "teacher_perplexity": after.teacher_perplexity,
        "top1_agreement": after.top1_agreement,
    }
    imitates = not config.loss.kind.needs_answers  # else nearer to the teacher is not what was asked for
    if imitates and after.kl > before.kl and not run.result["verdict"]:
        start_is = "its conversion" if known else "the checkpoint it began with"
        run.result["verdict"] = (
            f"worse than {start_is}: full KL {after.kl:.4f} instead of {before.kl:.4f}, both on held-out text"
        )
    run.save()
    show(config, run, before, after)


def _start(work: Workspace, cached: Artifact) -> tuple[Path, dict[str, Metrics]]:
    """The checkpoint that training starts from, converted where it has other formats, and what is known of it."""
    given = start_folder(work.config.checkpoint)
    if given is None and work.config.first:
        given = first.make(work, cached, work.config.first)
        work = first.converted_from(work, given)
    if given:
        said = checkpoints.manifest(given, work.model, work.machine)
        if checkpoints.has_formats(said, work.config.quant, work.model):
            return given, {}
    converted = convert.make(work, cached)
    return converted.folder, {"converted": convert.metrics(converted)}


def show(config: Config, run: Run, before: Metrics, after: Metrics) -> None:
    """What a person wants to know at the end: losses before and after, bits, times, where to go on."""
    result = run.result
    rows = [
        *_answers(run),
        ["KD loss (held-out)", f"{before.kd_loss:.4f}", f"{after.kd_loss:.4f}", "0"],
        ["full KL (held-out)", f"{before.kl:.4f}", f"{after.kl:.4f}", "0"],
        [
            "perplexity",
            f"{before.perplexity:.2f}",
            f"{after.perplexity:.2f}",
            f"{after.teacher_perplexity:.2f}",
        ],
        ["same first choice", f"{before.top1_agreement:.1%}", f"{after.top1_agreement:.1%}", "100%"],
    ]
    table(f"{result['run_id']}  {result['name']}", ["", "converted", "distilled", "teacher"], rows)
    quant, timing = result["quant"], result["timing"]
    roles = [f"{quant[key]} {role}" for role in ROLES if (key := f"{role}_bits_per_weight") in quant]
    spent = [f"{stage} {_spent(run, stage)}" for stage in STAGES if f"{stage}_s" in timing]
    samples = result["paths"].get("samples")
    told_of = {
        **({"verdict": result["verdict"]} if result["verdict"] else {}),
        "size, packed": said(quant),
        "quantized layers": f"{quant['bits_per_weight']} bits a weight ({', '.join(roles)})",
        **({"left dense": told(quant["dense"])} if quant["dense"] else {}),
        "time": ", ".join(spent),
        "peak memory": f"{result['memory']['peak_bytes'] / 1e9:.1f} GB",
        **({} if samples else {"samples": "none, without a tokenizer"}),
    }
    places = {
        "loss curve": near(run.folder / "loss.png"),
        **({"samples": near(samples)} if samples else {}),
        "go on with": onward(config, run, "chat"),
    }
    facts(told_of, places)


def _answers(run: Run) -> list[list[str]]:
    """What a token of an answer costs, where that is what was trained."""
    if not LossKind[run.result["config"]["loss"]["kind"]].needs_answers:
        return []
    metrics = run.result["metrics"]
    return [["answers, nats a token", f"{metrics['loss_initial']:.4f}", f"{metrics['loss_best']:.4f}", ""]]


def _spent(run: Run, stage: str) -> str:
    """How long a stage took; of what was made before the log says when."""
    return "reused" if run.result["reused"].get(stage) else duration(run.result["timing"][f"{stage}_s"])
