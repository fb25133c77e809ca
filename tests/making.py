"""Jobs that make one artifact of the tiny model, to be run, killed and run again in processes of their own."""

import hashlib
import json
import logging
import os
import signal
import time
from pathlib import Path

SHARD_ROWS = 4


def make_cache(outputs: str, text: str, environment: dict[str, str] | None = None) -> None:
    """The cache of a text file, in shards of four rows, each one batch; what it says goes to `outputs`/said."""
    import torch

    from qat.cache import writer
    from qat.config import CacheConfig, DataConfig, DataSource
    from qat.data.documents import obtain_documents
    from qat.machine import Machine
    from tests import tiny

    prepare(outputs, environment)
    writer.SHARD_ROWS = SHARD_ROWS
    machine, folder = Machine(torch.device("cpu"), torch.float32, SHARD_ROWS), Path(outputs)
    teacher = tiny.teacher_in(folder)
    data = DataConfig(name="text", source=DataSource.text, path=text, eval_fraction=0.25)
    documents = obtain_documents(data, teacher, 0, machine, folder)
    cache = CacheConfig(name="L16", length=16, top_k=4, random=3)
    writer.obtain_cache(cache, documents, "text", teacher, 0, machine, folder)


def make_answers(outputs: str, prompts: str) -> None:
    """Documents that the tiny teacher writes, four texts a batch in two rows."""
    import torch

    from qat.config import DataConfig, DataSource
    from qat.data.documents import obtain_documents
    from qat.generation import rows
    from qat.machine import Machine
    from tests import tiny

    prepare(outputs)
    rows.PROMPTS_AT_ONCE, rows.TEXTS_A_ROW = {"cpu": 2}, 2
    machine, folder = Machine(torch.device("cpu"), torch.float32, 3), Path(outputs)
    data = DataConfig(name="prompts", source=DataSource.selfgen, path=prompts, answer_tokens=6, eval_fraction=0.25)
    obtain_documents(data, tiny.teacher_in(folder), 0, machine, folder)


def prepare(outputs: str, environment: dict[str, str] | None = None) -> None:
    """One thread, and a log of its own."""
    import torch

    os.environ.update(environment or {})
    torch.set_num_threads(1)
    Path(outputs).mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=Path(outputs) / "said", level=logging.INFO, format="%(message)s")


def kill_when(process, there, seconds=60.0) -> bool:
    """`kill -9` as soon as `there()`; False where the process had finished before."""
    end = time.monotonic() + seconds
    while process.is_alive() and not there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)
    if not process.is_alive():
        process.join()
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    return True


def found(folder: Path, pattern: str) -> list[Path]:
    """What matches below a folder; nothing where a folder on the way is published, so renamed, meanwhile."""
    try:
        return list(folder.glob(pattern))
    except FileNotFoundError:
        return []


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, of a manifest without the moment at which it was made."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest() for path in files}


def _content(path: Path) -> bytes:
    if path.name != "manifest.json":
        return path.read_bytes()
    manifest = json.loads(path.read_text())
    made = manifest.pop("made", None)  # a run's own checkpoints do not say
    assert made is None or made["seconds"] > 0
    return json.dumps(manifest).encode()


def make_again(processes, job, outputs: Path, text: str) -> None:
    """Runs a job to its end."""
    process = processes.Process(target=job, args=(str(outputs), text))
    process.start()
    process.join(60)
    assert process.exitcode == 0
