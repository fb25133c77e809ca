"""Sweeps that can be resumed: their jobs, which of these are complete, and a summary of the results.

A sweep's folder holds `sweep.json`, the plan: every job with its overrides, its run identity, taken before
the first job starts, and a key over what its configuration decides. Each job has a folder named like its
run, so the jobs that are complete can be told from the rest whatever happened to the process.
"""

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qat import bounded, locks, names, plans, plots, scratch
from qat.artifacts import content_key, write_json, write_text
from qat.config import Config
from qat.errors import ArtifactError, ConfigError, MissingError
from qat.identities import PLAN, RESOLVED, RESULT, claim_run, claim_sweep, note
from qat.installation import command
from qat.plans import Job
from qat.records import Record, read
from qat.report.markdown import code, plain
from qat.report.markdown import table as rendered
from qat.shaping import shaping

WAITING = "not started"
# Figures to rank jobs by, in order of preference; the training loss only if all jobs have the same loss.
OBJECTIVES = {"kl": "full KL", "loss_best": "loss", "kd_loss_best": "KD loss", "kd_loss": "KD loss"}
COLUMNS = {"kl": "full KL", "loss_best": "loss", "kd_loss_final": "KD loss", "perplexity": "perplexity"}
TEXT = "held-out text"  # column shown if jobs were measured on different texts


@dataclass(frozen=True)
class Sweep:
    """A planned sweep; `flags` are the command line's own, such as `config_path`.

    Its outputs folder is recorded whole, so that it goes on there from any working directory; None in older plans.
    """

    folder: Path
    command: str
    flags: dict[str, str]
    jobs: list[Job]
    outputs: Path | None = None

    def record(self, job: Job) -> Record | None:
        """What the job left; None before it started."""
        folder = self.folder / job.run_id
        return read(folder, self.folder) if os.path.isfile(folder / RESULT) else None

    def status(self, job: Job) -> str:
        """The status of the job's record, or that it was not started."""
        record = self.record(job)
        return record.status if record else WAITING

    def remaining(self) -> list[Job]:
        """Jobs that are not complete."""
        return [job for job in self.jobs if self.status(job) != "complete"]

    def failures(self) -> Iterator[tuple[Job, str]]:
        """Jobs that failed, each with its reason."""
        for job in self.jobs:
            record = self.record(job)
            if record and record.status == "failed":
                yield job, record.text("error")

    def own_options(self) -> list[str]:
        """The flags that name options of a person's own, which only he can say are to be trusted."""
        if self.flags.get("config_name") == RESOLVED and "config_dir" not in self.flags:
            return []
        return [f"--{name.replace('_', '-')}={value}" for name, value in self.flags.items()]

    def swept(self) -> dict[str, list[str]]:
        """Keys in which the jobs differ, without the signs that add them, each with the value of every job."""
        table = [dict(text.lstrip("+").split("=", 1) for text in job.overrides) for job in self.jobs]
        keys = dict.fromkeys(key for row in table for key in row)
        columns = {key: [row.get(key, "") for row in table] for key in keys}
        return {key: values for key, values in columns.items() if len(set(values)) > 1}


def key_of(config: Config) -> str:
    """What tells jobs apart: all that can change a result, and what the user says of the run."""
    plain = names.comparable(shaping(config) | {"outputs": config.outputs})
    return content_key(plain | {"outputs": None, "goal": config.run.goal, "notes": config.run.notes})


def changed(overrides: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Overrides with some changed: each key once, as it was set last."""
    return list({text.partition("=")[0]: text for text in (*overrides, *changes)}.values())


def create(
    folder: Path | None, outputs: Path, command: str, flags: dict[str, str], jobs: dict[str, list[str]]
) -> Sweep:
    """Plans a sweep in a new folder, or in one that the user names, and takes an identity for each job.

    Raises:
        ConfigError: an override could not be read again as a value.

    Args:
        folder: where, if the user says so.
        outputs: the outputs folder.
        command: as typed.
        flags: of the command line.
        jobs: each job's key to its overrides, in order.
    """
    for text in filter(None, map(plans.foreign, jobs.values())):
        raise ConfigError(f"{text}: a sweep keeps its settings in a plan, which takes values alone: write it out")
    folder = folder or claim_sweep(outputs)
    folder.mkdir(parents=True, exist_ok=True)
    with scratch.locked(folder):  # locked, since another sweep would remove an empty folder that nobody holds
        planned = [Job(claim_run(outputs), overrides, key) for key, overrides in jobs.items()]
        for job in planned:
            note(outputs, job.run_id, folder / job.run_id)
        sweep = Sweep(folder, command, flags, planned, outputs.resolve())
        _save(sweep)
    return sweep


def find(outputs: Path, keys: Sequence[str]) -> Sweep | None:
    """The newest sweep below `outputs` of exactly these jobs that is not complete."""
    for path in sorted(outputs.glob(f"sweep-*/{PLAN}"), reverse=True):
        try:
            sweep = load(path.parent)
        except ArtifactError as error:  # a damaged plan is some other sweep's trouble
            bounded.tell_once(path, str(error))
            continue
        if [job.key for job in sweep.jobs] == list(keys) and sweep.remaining():
            return sweep
    return None


def load(folder: Path) -> Sweep:
    """The plan of a sweep.

    Raises:
        MissingError: there is none.
        ArtifactError: it cannot be read.
    """
    path = folder / PLAN
    if not os.path.lexists(path):
        raise MissingError(f"{folder} holds no {PLAN}: name the folder of a sweep, such as outputs/sweep-001")
    plan = plans.read(path)
    return Sweep(folder, plan.command, plan.flags, plan.jobs, plan.outputs)


@contextmanager
def held(sweep: Sweep) -> Iterator[None]:
    """Keeps other processes from running the same sweep; the hold ends with this process, however it ends.

    Raises:
        ConfigError: another process runs it.
    """
    path = sweep.folder / ".lock"
    if (lock := locks.take(path)) is None:
        who = f"another process is running it ({locks.holder(path)})"
        raise ConfigError(f"{sweep.folder} is this very sweep, and {who}")
    try:
        yield
    finally:
        lock.release()


def has_job(folder: Path) -> bool:
    """True for the folder of a planned job: what an earlier attempt left in it is of this very configuration."""
    if not os.path.isfile(folder.parent / PLAN):
        return False
    try:
        return folder.name in [job.run_id for job in load(folder.parent).jobs]
    except ArtifactError as error:  # a damaged plan is some other sweep's trouble
        bounded.tell_once(folder.parent / PLAN, str(error))
        return False


def summarize(sweep: Sweep) -> dict[str, Any]:
    """Writes `summary.json`, `summary.md` and `sweep.png` into the sweep's folder; returns the first."""
    rows, swept = _rows(sweep), sweep.swept()
    ranked = [key for key in OBJECTIVES if key != "loss_best" or not any(name.startswith("loss") for name in swept)]
    objective = next((key for key in ranked if any(row["metrics"].get(key) is not None for row in rows)), "kl")
    rows.sort(key=lambda row: _rank(row, objective))
    summary = {
        "schema": 1,
        "sweep": sweep.folder.name,
        "command": sweep.command,
        "objective": objective,
        "complete": sum(row["status"] == "complete" for row in rows),
        "jobs": rows,
    }
    write_json(sweep.folder / "summary.json", summary)
    write_text(sweep.folder / "summary.md", _markdown(sweep, summary))
    if any(row["metrics"].get(objective) is not None for row in rows):
        points = [(row["values"], row["metrics"].get(objective)) for row in rows if row["metrics"]]
        plots.sweep(points, OBJECTIVES[objective], sweep.folder.name, sweep.folder / "sweep.png")
    return summary


def cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that a person reads, best first; with the status unless all are complete."""
    jobs = summary["jobs"]
    shown = [key for key in COLUMNS if any(job["metrics"].get(key) is not None for job in jobs)]
    told = ["status"] if any(job["status"] != "complete" for job in jobs) else []
    header = ["run", *jobs[0]["values"], *(COLUMNS[key] for key in shown), *told]
    rows = []
    for job in jobs:
        figures = [_figure(job["metrics"].get(key)) for key in shown]
        rows.append([job["run_id"], *job["values"].values(), *figures, *(job[key] for key in told)])
    return header, rows


def remark(summary: dict[str, Any]) -> str:
    """What keeps the figures of a sweep from being compared; nothing where they can be."""
    grounds = _grounds(summary["jobs"])
    if grounds < 2:
        return ""
    return f"These jobs were measured on {grounds} different teachers or texts: figures compare only within one."


def how_to_go_on(sweep: Sweep) -> tuple[str, str]:
    """What is left, and the command that does it; nothing when all is complete."""
    left = len(sweep.remaining())
    if not left:
        return "", ""
    again = [*sweep.own_options(), f"sweep.resume={sweep.folder}"]
    return f"{left} of {len(sweep.jobs)} jobs are left; to go on:", f"{command()} {shlex.join(again)}"


def _save(sweep: Sweep) -> None:
    plan = {
        "schema": 1,
        "command": sweep.command,
        "flags": sweep.flags,
        "outputs": str(sweep.outputs) if sweep.outputs else None,
        "jobs": [asdict(job) for job in sweep.jobs],
    }
    write_json(sweep.folder / PLAN, plan)


def _rows(sweep: Sweep) -> list[dict[str, Any]]:
    swept = sweep.swept()
    rows: list[dict[str, Any]] = []
    for index, job in enumerate(sweep.jobs):
        record = sweep.record(job)
        metrics = {key: record.number("metrics", key) for key in record.section("metrics")} if record else {}
        rows.append(
            {
                "run_id": job.run_id,
                "status": sweep.status(job),
                "values": {key: values[index] for key, values in swept.items()},
                "ground": list(record.ground) if record else ["", ""],
                "metrics": metrics,
                "error": record.text("error") if record else "",
            }
        )
    if _grounds(rows) > 1:
        for row in rows:
            row["values"][TEXT] = " ".join(part[:12] for part in row["ground"]) if row["metrics"] else ""
    return rows


def _grounds(rows: list[dict[str, Any]]) -> int:
    """The number of different pairs of teacher and text among the jobs; only figures of one pair can be compared."""
    return len({tuple(row["ground"]) for row in rows if row["metrics"]})


def _rank(row: dict[str, Any], objective: str) -> tuple[bool, list[str], float]:
    value = row["metrics"].get(objective)
    return row["status"] != "complete", row["ground"], math.inf if value is None else value


def _markdown(sweep: Sweep, summary: dict[str, Any]) -> str:
    header, rows = cells(summary)
    table = rendered(tuple(map(plain, header)), [list(map(plain, row)) for row in rows])
    failed = [f"- {job.run_id} failed: {plain(reason)}" for job, reason in sweep.failures()]
    parts = [f"# {plain(summary['sweep'])}", code(sweep.command), table, remark(summary), "\n".join(failed)]
    left, again = how_to_go_on(sweep)
    parts.append(f"{left} {code(again)}" if left else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
