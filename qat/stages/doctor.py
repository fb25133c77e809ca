"""Reports what this machine has, what a run would use, and what is wrong; no files are left behind.

Each examination gives findings, one line of the table. What is wrong is said in a sentence below it and
never ends the diagnosis: a broken installation is what it is for.
"""

import os
import platform
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.table import Table

from qat import capacity, footprint, gpus, machine, models, system, tracking
from qat.config import Config, InstanceConfig, Stage, StoreConfig, StoreKind
from qat.console import console, size
from qat.errors import MissingError, QatError, reason
from qat.installation import INSTALLED, NAME, ROOT, to_install
from qat.runs import commit
from qat.stages import limits
from qat.store.places import open_place

SHOWN = ("torch", "transformers", "tokenizers", "safetensors", "hydra-core", "wandb")
MADE = ("t4", "a100", "h100", "h200")  # options of `instance` for one GPU; each is also part of the GPU's name
ROOMY = 5e9  # bytes that the default run needs at most, of memory and of disk


@dataclass(frozen=True)
class Finding:
    """One line of the table; a `warning` says what is wrong with it and what to do."""

    what: str
    found: str
    warning: str = ""


def main(config: Config) -> None:
    """`stage=doctor`."""
    findings = list(examine(config))
    table = Table(show_header=False, title="doctor", title_justify="left", title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(f"! {finding.what}" if finding.warning else finding.what, finding.found)
    console.print(table)
    warnings = [finding for finding in findings if finding.warning]
    for finding in warnings:
        console.say(f"warning: {finding.what}: {finding.warning}")
    if not warnings:
        console.print("nothing is amiss")


def examine(config: Config) -> Iterator[Finding]:
    """Everything that is looked at, from the hardware up."""
    yield Finding("computer", _computer())
    yield _memory()
    yield from _gpus()
    yield _instance(config.instance)
    if config.instance.name != "auto":
        yield _instance(InstanceConfig(name="auto"))
    yield _disk(Path(config.outputs))
    yield from _packages()
    yield from _models(config)
    yield from _plan(config)
    yield _store(config.store)
    yield Finding("wandb", _wandb())
    yield Finding("hub", _hub_login())


def _wandb() -> str:
    host = tracking.host()
    if tracking.logged_in():
        return f"logged in for {host}"
    return f"no login for {host}: runs are kept offline, and each says how it is sent (wandb sync)"


def _computer() -> str:
    threads = torch.get_num_threads()
    return f"{platform.system()} {platform.machine()}, {system.cores()} cores, of which torch uses {threads}"


def _memory() -> Finding:
    free, whole = capacity.host()
    scarce = f"the default run takes up to {size(ROOMY)}: close something, or try +experiment=quick"
    return Finding("memory", f"{size(free)} of {size(whole)} free", scarce if free < ROOMY else "")


def _gpus() -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        yield _gpu(index)
    if count or torch.backends.mps.is_available():
        return
    present = len(gpus.visible())
    unusable = (
        f"this computer has {present} of NVIDIA's, which torch {torch.__version__} cannot use: install a build of torch"
        " for CUDA, or a newer driver"
    )
    yield Finding("gpu", "none", unusable if present else "")


def _gpu(index: int) -> Finding:
    """A GPU by name, with the option of `instance` that is made for it."""
    name = torch.cuda.get_device_name(index)
    made = [option for option in MADE if option in re.split(r"\W+", name.lower())]
    advice = f"; instance={made[0]} is made for it" if made else ""
    try:
        free, whole = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Finding(f"gpu {index}", name, f"it does not answer ({reason(error)}): restart it or its driver")
    return Finding(f"gpu {index}", f"{name}, {size(free)} of {size(whole)} free{advice}")


def _instance(instance: InstanceConfig) -> Finding:
    """What an instance comes down to here, tried on one matrix product."""
    what = f"instance={instance.name}"
    try:
        resolved = machine.resolve(instance)
        speed = machine.matmul_flops(resolved)
    except MissingError as error:
        return Finding(what, "cannot be had here", str(error))
    except RuntimeError as error:
        return Finding(what, "does not compute", f"a matrix product fails ({reason(error)})")
    found = (
        f"{resolved.describe()}, {resolved.micro_batch} sequences at once, layers"
        f" {'compiled' if resolved.compile else 'not compiled'}; {speed / 1e9:,.0f} GFLOP/s in a product"
    )
    emulated = resolved.dtype is torch.bfloat16 and resolved.device.type != "mps"
    if emulated and not machine.computes_bf16(resolved.device):
        return Finding(what, found, "bfloat16 is emulated on this hardware and slow: use instance=auto")
    return Finding(what, found)


def _disk(outputs: Path) -> Finding:
    folder = outputs.expanduser().resolve()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    usage = shutil.disk_usage(nearest)
    found = f"{size(usage.free)} of {size(usage.total)} free for {outputs}"
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        return Finding("disk", found, f"{nearest} is no folder that can be written to: choose another outputs=<folder>")
    scarce = f"the default run leaves up to {size(ROOMY)}: make room, or choose another outputs=<folder>"
    return Finding("disk", found, scarce if usage.free < ROOMY else "")


def _packages() -> Iterator[Finding]:
    project = _project()
    versions = [f"{name} {metadata.version(name)}" for name in SHOWN if not _lacking(name)]
    came = "installed" if INSTALLED else f"commit {commit() or 'unknown'}"
    yield Finding("source", f"{NAME} {project.version}, {came}")
    lacking = [need for need in project.needs if _lacking(need)]
    how = f"pip install {NAME}" if INSTALLED else "make setup`, or `pip install -e ."
    remedy = f"{', '.join(lacking)} not installed: run `{how}` into this environment"
    versions.insert(0, f"python {platform.python_version()}")
    yield Finding("packages", ", ".join(versions), remedy if lacking else "")
    there = [name for name, needs in project.extras.items() if not any(map(_lacking, needs))]
    absent = [name for name in project.extras if name not in there]
    found = ", ".join(there) or "none"
    if absent:
        found += f"; not {', '.join(absent)} ({to_install(absent[0])})"
    yield Finding("extras", found)


@dataclass(frozen=True)
class _Project:
    """What this project says of itself."""

    version: str
    needs: list[str]
    extras: dict[str, list[str]]


def _project() -> _Project:
    """As a clone's pyproject.toml has it, or the metadata that an installed package keeps."""
    if not INSTALLED:
        said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return _Project(said["version"], said["dependencies"], said["optional-dependencies"])
    kept = metadata.metadata(NAME)
    needs = kept.get_all("Requires-Dist") or []
    extras = {name: [need for need in needs if _is_of(need, name)] for name in kept.get_all("Provides-Extra") or []}
    return _Project(kept["Version"], [need for need in needs if "extra ==" not in need], extras)


def _is_of(requirement: str, extra: str) -> bool:
    """Whether a requirement is one of an extra, on this platform."""
    marker = Requirement(requirement).marker
    return "extra ==" in requirement and marker is not None and marker.evaluate({"extra": extra})


def _lacking(requirement: str) -> bool:
    """True where a requirement is not installed, or in another version."""
    need = Requirement(requirement)
    try:
        return not need.specifier.contains(metadata.version(need.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return True


def _models(config: Config) -> Iterator[Finding]:
    for key, asked in (("model", config.model), ("teacher", config.teacher)):
        if asked is None:
            continue
        what = f"{key}={asked.name}"
        try:
            yield Finding(what, models.whereabouts(asked))
        except QatError as error:
            yield Finding(what, "not there", str(error))


def _plan(config: Config) -> Iterator[Finding]:
    """The memory that each phase of the run that was typed is expected to take, and what makes it fit."""
    try:
        artifacts, resolved = Path(config.outputs) / "artifacts", machine.resolve(config.instance)
        asked = config.teacher or config.model
        model, teacher = (models.at_hand(one, artifacts) for one in (config.model, asked))
        if model is None or teacher is None:
            absent = f"model={config.model.name}" if model is None else f"teacher={asked.name}"
            yield Finding("memory of a run", f"known once {absent} is on this computer")
            return
        teacher = models.fitted(model, teacher) if config.teacher else model
        run = replace(config, stage=Stage.run)
        for name, place in limits.planned(run, model, teacher, resolved).items():
            advice = limits.advice(run, model, teacher, resolved, name, place)
            yield Finding(f"memory, {name}", footprint.told(place), advice)
    except QatError as error:
        yield Finding("memory of a run", "cannot be reckoned", str(error))


def _store(store: StoreConfig) -> Finding:
    what = f"store={store.name}"
    if store.kind is StoreKind.local:
        return Finding(what, "nothing leaves outputs/")
    try:
        place = open_place(store)
        return Finding(what, f"{place.url} is reachable, with {len(place.entries())} files and folders")
    except QatError as error:
        return Finding(what, "cannot be reached", str(error))


def _hub_login() -> str:
    from huggingface_hub import get_token

    return "logged in" if get_token() else "no login: public models and data sets only"
