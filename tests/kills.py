"""Commands that are killed before each of their operations, and what must hold after that.

A case is a command over a folder that was prepared once. Killed in a copy of that folder, it leaves whole what it
would have replaced, or the new one; run again, it comes to the same bytes as one that nobody disturbed, and nothing
half-made is left. What is compared does not depend on how the program goes about it: every file under a name of its
own is opened, and whatever looks like scratch counts as such.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat import transfer
from qat.artifacts import MANIFEST, open_artifact
from qat.errors import QatError
from qat.store import names as store_names
from qat.store.places import Place
from tests.killing import Killed
from tests.launching import Launch

TINY = (
    "+debug=tiny",
    "quant=q2a16",
    "data.documents=64",
    "instance.precision=fp32",
    "evaluate.sample_tokens=1",
    "train.steps=3",
    "train.save_every=1",
    "train.keep=1",
)
STORE = ("store=gdrive", "store.path={root}/store")
EXPORT = ("+debug=tiny", "stage=export", "export.output={root}/export")
FORMS = {  # what is exported, and formats that it can hold
    "hf": "q2a16",
    "packed": "q2a16",
    "anemll_v2": "q2a16",
    "gguf": "gguf_q8_0",
    "mlx": "mlx_4bit_g64",
    "compressed": "compressed_w4_g64",
}
HIDDEN = (".hydra", ".ids")
Problems = Iterator[str]


@dataclass(frozen=True)
class Case:
    """A command and what it stands on.

    Attributes:
        name: what the table calls it.
        words: of the command; `{root}` is the folder that everything lies in.
        prepare: fills that folder, once.
        held: problems of what a reader finds right after the kill.
        result: what is compared with an undisturbed run's.
        parts: below the root, whose operations count.
    """

    name: str
    words: tuple[str, ...]
    prepare: Callable[[Path], None]
    held: Callable[[Path], Problems]
    result: Callable[[Path], Any]
    parts: tuple[str, ...] = ("",)

    def launch(self, root: Path, number: int) -> Killed:
        """The command in a folder, killed before its n-th operation there, whole with 0."""
        words = [word.format(root=root) for word in self.words]
        folders = [root / part for part in self.parts]
        return Killed(root / "outputs", *words, folders=folders, number=number, home=root / "tmp")


def launched(root: Path, *words: str) -> None:
    """A command that goes through."""
    code, out, err = Launch(root / "outputs", *(word.format(root=root) for word in words)).ended()
    assert code == 0, out + err


def undisturbed(case: Case, base: Path, root: Path) -> tuple[list[str], Any]:
    """The operations of a case and its result; `base` is its prepared folder."""
    shutil.copytree(base, root)
    launch = case.launch(root, 0)
    code, out, err = launch.ended()
    assert code == 0, out + err
    problems = [*case.held(root), *scratch_in(root)]
    assert not problems, problems
    return launch.operations(), case.result(root)


def trial(case: Case, base: Path, root: Path, number: int, expected: Any) -> list[str]:
    """What is wrong after a kill before the n-th operation, and after the same command again."""
    shutil.copytree(base, root)
    launch = case.launch(root, number)
    code, _, err = launch.ended()
    if code == 0:
        return []  # threads took turns in another order, and there was no such operation
    problems = [f"lost: {problem}" for problem in (*whole(root), *case.held(root))]
    if code != -9:
        problems.append(f"ended with {code}: {err[-300:]}")
    code, _, err = case.launch(root, 0).ended()
    if code != 0:
        return [*problems, f"wrong: the command again ends with {code}: {err[-300:]}"]
    problems += [f"lost: {problem}" for problem in (*whole(root), *case.held(root))]
    problems += [f"scratch: {path}" for path in scratch_in(root)]
    problems += [f"log: {problem}" for problem in misrecorded(root / "outputs")]
    if case.result(root) != expected:
        problems.append("wrong: another result")
    return problems


def whole(root: Path) -> Problems:
    """What stands under its final name and is not whole."""
    folders = [*root.glob("outputs/artifacts/*/*"), *root.glob("outputs/**/checkpoints/*"), *root.glob("export*")]
    for folder in folders:
        if folder.is_dir() and not folder.name.startswith(".") and not (folder / ".hydra").exists():
            yield from damage(folder)


def damage(folder: Path) -> Problems:
    """What is wrong with an artifact."""
    try:
        files = open_artifact(folder).manifest["files"]
    except QatError as error:
        yield str(error)
        return
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if there != set(files):
        yield f"{folder}: {sorted(there ^ set(files))} are not what its manifest lists"


def scratch_in(root: Path) -> list[str]:
    """Paths that only a process at work has a use for."""
    found = [path.relative_to(root).as_posix() for path in root.rglob("*") if _is_scratch(path)]
    found += [f"tmp/{path.name}" for path in (root / "tmp").glob("*")]
    for checkpoints in root.glob("outputs/**/checkpoints"):
        states = sorted(checkpoints.glob("state-*"))
        found += [path.name for path in states[:-1] if (checkpoints / "last").exists()]
    return sorted(set(found))


def _is_scratch(path: Path) -> bool:
    if not path.name.startswith("."):
        empty = path.is_dir() and path.name.startswith("sweep-") and not any(path.iterdir())
        return empty or bool(re.search(r"partial|\.tmp|scratch", path.name))
    note = re.fullmatch(r"\.(.+)\.(lock|checked|looked_at)", path.name)
    kept = note is not None and (path.with_name(note[1]).exists() or note[2] == "lock")
    return path.name not in (*HIDDEN, ".lock") and not kept


def misrecorded(outputs: Path) -> Problems:
    """Runs whose record is not honest, or not in the log as it stands."""
    log = (outputs / "RUNS.md").read_text() if (outputs / "RUNS.md").exists() else ""
    for path in outputs.glob("**/result.json"):
        result = json.loads(path.read_text())
        if result["status"] not in ("complete", "interrupted") or result["error"]:
            yield f"{path} says {result['status']}: {result['error']}"
        if log and not re.search(rf"{result['run_id']}\b.*\b{result['status']}\b", log):
            yield f"{result['run_id']}, {result['status']}, is not in RUNS.md"


def artifacts(root: Path) -> dict[str, Any]:
    """The files of every artifact, by its name."""
    found = sorted(path for path in root.glob("outputs/artifacts/*/*") if not path.name.startswith("."))
    return {path.name: open_artifact(path).manifest["files"] for path in found if path.is_dir()}


def made_by(folder: Path) -> dict[str, Any]:
    """What a run came to: its bytes, and its figures."""
    checkpoints = {name: open_artifact(folder / "checkpoints" / name).manifest["files"] for name in ("best", "last")}
    result = json.loads((folder / "result.json").read_text())
    texts = {name: (folder / name).read_text() for name in ("metrics.jsonl", "samples.md")}
    texts["loss.png"] = (folder / "loss.png").read_text()
    return {"metrics": result["metrics"], "quant": result["quant"], **checkpoints, **texts}


def complete(outputs: Path) -> list[Path]:
    """Folders of the runs that are complete."""
    found = [path.parent for path in sorted(outputs.glob("**/result.json")) if "samples.md" in str(path.read_text())]
    return [folder for folder in found if json.loads((folder / "result.json").read_text())["status"] == "complete"]


def newest_run(root: Path) -> Any:
    """Artifacts and the last run that is complete."""
    return artifacts(root), made_by(complete(root / "outputs")[-1])


def jobs(root: Path) -> Any:
    """Artifacts, and what each job of the sweeps came to, by its learning rate."""
    runs = complete(root / "outputs")
    rates = [json.loads((run / "result.json").read_text())["config"]["train"]["lr"] for run in runs]
    plans = [json.loads(path.read_text()) for path in root.glob("outputs/sweep-*/summary.json")]
    return artifacts(root), dict(zip(rates, map(made_by, runs), strict=True)), {plan["complete"] for plan in plans}


def nothing(root: Path) -> Problems:
    """For a command that replaces nothing."""
    return iter(())


def export_there(root: Path) -> Problems:
    """The older export or the new one is in its place."""
    yield from damage(root / "export")


def in_store(kind: str, name: str) -> Callable[[Path], Problems]:
    """An archive of the store can be pulled, whether the older one or the new one."""

    def held(root: Path) -> Problems:
        place, target = Place(str(root / "store")), root.with_name(f"{root.name}-pulled")
        try:
            entries = place.entries()
            entry = store_names.find(entries, [name])
            assert entry is not None
            folder = transfer.pull(place, entries, entry, target, kind)
            if kind == "checkpoints":
                yield from damage(folder)
        except (QatError, AssertionError) as error:
            yield f"{name} in the store: {error}"
        finally:
            shutil.rmtree(target, ignore_errors=True)

    return held


def export_files(root: Path) -> Any:
    """The files of the export, wherever it was made."""
    files = open_artifact(root / "export").manifest["files"]
    return {name: (root / "export" / name).read_bytes().replace(str(root).encode(), b"") for name in files}


def store_files(root: Path) -> Any:
    """The files of the store."""
    return {path.relative_to(root): path.read_bytes() for path in root.glob("store/**/*") if path.is_file()}


def mirrored_run(root: Path) -> Any:
    """The run that goes on, and that the store has it whole."""
    with_store = [path.relative_to(root) for path in root.glob("store/**/*") if path.is_file()]
    return made_by(root / "outputs" / "SR-001"), sorted(with_store)


def pulled_files(root: Path) -> Any:
    """What was pulled."""
    return open_artifact(root / "outputs" / "checkpoints" / "student").manifest["files"]


def reports(root: Path) -> Any:
    """The run log and the report."""
    return [(root / "outputs" / name).read_text() for name in ("RUNS.md", "report.html")]


def empty(root: Path) -> None:
    """Nothing there."""
    root.mkdir(parents=True)


def two_students(root: Path, quant: str = "q2a16") -> None:
    """Two runs that differ in their learning rate."""
    launched(root, *TINY, f"quant={quant}")
    launched(root, *TINY, f"quant={quant}", "train.lr=3e-3")


def two_runs(root: Path) -> None:
    """Two students; the first is in the store, under the name that the second will take."""
    two_students(root)
    (root / "store").mkdir()
    launched(root, "+debug=tiny", "stage=push", "checkpoint=SR-001", "store.archive=student", *STORE)


def exported(form: str) -> Callable[[Path], None]:
    """Two students, of which the first is exported."""

    def prepare(root: Path) -> None:
        two_students(root, FORMS[form])
        launched(root, *EXPORT, f"export={form}", "checkpoint=SR-001")

    return prepare


def stored(root: Path) -> None:
    """A student in the store, which is not here."""
    two_runs(root)
    launched(root, "+debug=tiny", "stage=push", "checkpoint=SR-002", "store.archive=student", *STORE)
    shutil.rmtree(root / "outputs")


def stopped(root: Path) -> None:
    """A run that was killed between its first two states, and of which the store has a copy."""
    twin = root.with_name(f"{root.name}-twin")
    empty(twin)
    whole = Killed(twin / "outputs", *TINY, folders=[twin], number=0, home=twin / "tmp")
    assert whole.ended()[0] == 0
    number = next(n for n, told in enumerate(whole.operations(), start=1) if "state-00000002" in told)
    shutil.rmtree(twin)
    empty(root)
    killed = Killed(root / "outputs", *TINY, folders=[root], number=number, home=root / "tmp")
    assert killed.ended()[0] == -9
    run = root / "outputs" / "SR-001"
    (root / "store").mkdir()
    (run / "mirror.txt").write_text("SR-001")
    transfer.push(Place(str(root / "store")), run, "runs", "SR-001")


def cases() -> list[Case]:
    """All of them."""
    resume = (*TINY, "run.resume=SR-001")
    push = ("+debug=tiny", "stage=push", "checkpoint=SR-002", "store.archive=student", *STORE)
    pull = ("+debug=tiny", "stage=pull", "store.archive=student", *STORE)
    export = (*EXPORT, "checkpoint=SR-002")
    mirror = (*resume, *STORE, "store.mirror=true")
    return [
        Case("run", TINY, empty, nothing, newest_run),
        Case("sweep", ("-m", *TINY, "train.lr=1e-3,2e-3"), empty, nothing, jobs),
        Case("resume", resume, stopped, nothing, newest_run),
        Case("push", push, two_runs, in_store("checkpoints", "student"), store_files),
        Case("pull", pull, stored, nothing, pulled_files),
        Case("mirror", mirror, stopped, in_store("runs", "SR-001"), mirrored_run, ("store", "tmp")),
        *(Case(f"export {f}", (*export, f"export={f}"), exported(f), export_there, export_files) for f in FORMS),
        Case("report", ("+debug=tiny", "stage=report"), two_runs, nothing, reports),
    ]
