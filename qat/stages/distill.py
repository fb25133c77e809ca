"""Stage 3: the student learns from the cache."""

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qat import checkpoints, machine, names, plots, sweeps
from qat.artifacts import Artifact
from qat.cache.reader import CacheReader
from qat.config import Config
from qat.console import duration, facts, table
from qat.distill.loss import Loss
from qat.distill.state import States
from qat.distill.trainer import History, Trainer, cuts
from qat.forward import Pass, use
from qat.models import ModelFolder
from qat.peaks import TRAINING, peaks
from qat.processes import Ranks, joined, place
from qat.quant import adapter
from qat.quant.architectures import Layer
from qat.quant.linear import quantized
from qat.quant.size import said, summary
from qat.runs import Run, checkpoint_name, owner
from qat.shown import near
from qat.stages import cache
from qat.stages.onward import onward
from qat.stages.teacher import check_mode
from qat.stages.workspace import Workspace, open_workspace, start_folder

log = logging.getLogger(__name__)

# Held-out figures of `result.json`: the loss that is trained, by which `best` goes, and the run log's.
HELD_OUT = [f"{loss}_{when}" for loss in ("loss", "kd_loss") for when in ("initial", "best", "final")]


def main(config: Config, run: Run) -> None:
    """`stage=distill`: trains a given checkpoint."""
    work = open_workspace(config, run)
    start = start_folder(config.checkpoint)
    assert start is not None  # as qat.cli.checks sees to
    make(work, cache.make(work), start)
    if run.result["verdict"]:
        log.warning("%s is %s", run.result["run_id"], run.result["verdict"])
    if place().first:
        _show(config, run)


def _show(config: Config, run: Run) -> None:
    """Losses before and after, size, where to go on."""
    result, metrics = run.result, run.result["metrics"]
    names = {"loss": f"{config.loss.name} (held-out)", "kd_loss": "KD loss (held-out)"}
    rows = [[name, *(f"{metrics[f'{key}_{when}']:.4f}" for when in ("initial", "best"))] for key, name in names.items()]
    table(f"{result['run_id']}  {result['name']}", ["", "before", "best"], rows)
    places = {"loss curve": near(run.folder / "loss.png"), "go on with": onward(config, run, "chat")}
    facts({"size, packed": said(result["quant"]), "time": f"distill {duration(result['timing']['distill_s'])}"}, places)


def make(work: Workspace, cached: Artifact, start: Path) -> Path:
    """Trains from the checkpoint at `start`; returns the folder of the best checkpoint."""
    run, config = work.run, work.config
    with work.timed("distill"), joined(work.machine.device) as ranks, peaks.phase(TRAINING):
        student, manifest = checkpoints.load(start, work.model, work.machine, latents=config.train.learn.latent > 0)
        layers = checkpoints.layers_of(manifest)
        check_mode(config.mode, layers, work.model)
        folders = {name: run.folder / "checkpoints" / name for name in ("best", "last")}
        description = checkpoints.heritage(manifest) | {"run": run.result["run_id"]}

        def save(name: str) -> None:
            with trainer.learners.whole():
                if ranks.first:
                    checkpoints.save(student, folders[name], description)

        trainer = _trainer(work, cached, student, layers, ranks)
        sizes = summary(layers, work.model.skeleton(), adapters=adapter.size(student))
        run.result["quant"] = {"preset": manifest["quant"]["name"], **sizes}
        states = _states(work, run.folder) if ranks.first else None
        _resume(work, trainer)
        history = trainer.run(run.log, lambda: save("best"), states)
        save("last")
        if ranks.first:
            _record(work, history, sum(layer.weights for layer in layers), ranks.count)
    run.result["paths"] |= {name: str(folder) for name, folder in folders.items()}
    run.save()
    return folders["best"]


def train_into(work: Workspace, cached: Artifact, start: Path, folder: Path) -> dict[str, Any]:
    """Trains from the checkpoint at `start`, in this process alone, and leaves the best student in `folder`.

    Returns:
        What the manifest of a checkpoint says, with the held-out KD loss before and after.
    """
    latents = work.config.train.learn.latent > 0
    with peaks.phase(TRAINING):
        student, manifest = checkpoints.load(start, work.model, work.machine, latents=latents)
        trainer = _trainer(work, cached, student, checkpoints.layers_of(manifest), Ranks())
        history = trainer.run(lambda row: None, lambda: checkpoints.write(student, folder), None)
    found = {name: getattr(history, name) for name in ("kd_loss_initial", "kd_loss_best")}
    log.info("%s: KD loss %.4f before training, %.4f after", manifest["quant"]["name"], *found.values())
    return checkpoints.heritage(manifest) | found


def _resume(work: Workspace, trainer: Trainer) -> None:
    """Takes over the newest state of the run that is gone on with; without one, begins at the beginning.

    Every process does what the first one does, as others work in folders where nothing was done before.
    """
    run, ranks = work.run, trainer.ranks
    told = ranks.tell(str((ranks.first and _earlier(work)) or ""), work.machine.device)
    earlier = Path(told) if told else None
    state = _states(work, earlier).newest() if earlier else None
    rows = run.rewind(state.facts["logged"] if state else 0)
    if state is not None:
        trainer.restore(state, rows)
        log.info("%s goes on after step %d of %d", run.result["run_id"], state.step, work.config.train.steps)


def _states(work: Workspace, folder: Path) -> States:
    """The states of the run in a folder."""
    return States(folder / "checkpoints", work.config.train.keep, owner(folder))


def _earlier(work: Workspace) -> Path | None:
    """Where an earlier attempt at this run left its states: what `run.resume` names, or a sweep's job itself."""
    config, folder = work.config, work.run.folder
    if config.run.resume:
        return names.run(config.run.resume, Path(config.outputs))
    return folder if sweeps.has_job(folder) else None


def _trainer(work: Workspace, cached: Artifact, student: PreTrainedModel, layers: list[Layer], ranks: Ranks) -> Trainer:
    config, modules = work.config, quantized(student)
    training, held_out = CacheReader(cached, "train"), CacheReader(cached, "eval")
    use(student, _settled(work, work.model, training))
    return Trainer(
        student,
        {layer.name: (layer.role, modules[layer.name]) for layer in layers},
        (training, held_out),
        config.train,
        config.mode,
        _loss(work, training),
        work.machine,
        config.seed,
        ranks,
    )


def _settled(
    work: Workspace, which: ModelFolder, text: CacheReader, model: PreTrainedModel | None = None
) -> Pass:
    """How a model is computed over rows of all lengths that training cuts them into: the least fast of the ways."""
    ways = [work.settle(which, rows, model) for rows in cuts(text, work.config.train)]
    return next((how for how in ways if not how.plain), ways[0])


def _loss(work: Workspace, text: CacheReader) -> Loss:
    loss, machine = work.config.loss, work.machine
    if not loss.kind.needs_teacher:
        return Loss(loss.kind, loss.temperature, loss.hard)
    beside = work.teacher.load(machine.dtype, machine.device)
    use(beside, _settled(work, work.teacher, text, beside))
    return Loss(loss.kind, loss.temperature, loss.hard, beside)


def _record(work: Workspace, history: History, weights: int, devices: int) -> None:
    result = work.run.result
    result["name"] = checkpoint_name(result["quant"]["preset"], work.config.mode.name, history.kd_loss_best)
    result["metrics"] |= {name: getattr(history, name) for name in HELD_OUT}
    result["training"] = {
        "steps": history.step,
        "best_step": history.best_step,
        "skipped_steps": history.skipped,
    }
    if history.best_step == 0:
        result["verdict"] = (
            f"no better than it began: its loss on held-out text went from {history.loss_initial:.4f} to"
            f" {history.loss_final:.4f}, so checkpoints/best is what training began with"
        )
    speed = history.tokens / history.seconds
    result["throughput"] = {
        "tokens_per_second": round(speed, 1),
        "mfu": round(6 * weights * speed / (devices * machine.matmul_flops(work.machine)), 4),
    }
    plots.loss_curve(history.rows, f"{work.model.name}: {result['name']}", work.run.folder / "loss.png")
