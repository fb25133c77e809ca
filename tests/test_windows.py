"""Nothing in the package needs what Windows lacks: see `tests.windows`."""

import ast
import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from qat import scratch, system
from tests import kills, launching, making, parsed, windows

ROOT = Path(__file__).resolve().parents[1]
# What is about systems: the one, and what only a sweep on Linux runs.
ABOUT = {"qat/system.py", "qat/cli/apart.py"}


def lacked(file):
    """Names in a file that a Python on Windows would not find."""
    for node in parsed.nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in windows.MODULES)
        elif isinstance(node, ast.ImportFrom):
            missing = windows.FUNCTIONS.get(node.module, ())
            yield from (alias.name for alias in node.names if alias.name in missing)
            yield from {node.module} & {*windows.MODULES}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from {node.attr} & {*windows.FUNCTIONS.get(node.value.id, ())}


def test_one_file_knows_of_systems():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qat").rglob("*.py") if [*lacked(path)]}
    assert found == ABOUT
    assert not [*lacked(ROOT / "launch.py")]


def test_a_process_imports_all_that_a_run_needs():
    code = (
        "from tests import windows; windows.without()\n"
        "import launch, qat.stages.run, qat.stages.export, qat.report.page, qat.plugins.hydra_plugins.qat_sweeper\n"
        "from qat import system; print(system.fcntl, system.resource, system.peak_bytes())"
    )
    done = launching.python("-c", launching.WITHOUT_OURS + code)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"None None {1 << 30}\n", "")


def files(outputs):
    """SHA-256 of all that a run and its artifacts hold of numbers and text."""
    found = [making.hashes(outputs / where) for where in ("artifacts", "SR-001/checkpoints")]
    hashes = {name: digest for part in found for name, digest in part.items()}
    named = [name for name in hashes if name.endswith((".safetensors", ".jsonl"))]
    return {name: hashes[name] for name in named if not name.startswith("state-")}  # generators as they were found


def odd_defaults():
    """What some library, or another thread that loads a model, may leave behind in a process."""
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


def test_jobs_give_the_files_that_they_give_on_linux_whatever_the_defaults_of_the_process(tmp_path):
    """A run, a sweep in this process, an export and one in its place, a report."""
    there, here = tmp_path / "there", tmp_path / "here"
    assert launching.Launch(here, *kills.TINY, before=odd_defaults).ended()[::2] == (0, "")
    export = ["--config-path", f"{there}/SR-001", "stage=export", "checkpoint=SR-001", f"export.output={tmp_path}/out"]
    sweep = [*kills.TINY, "-m", "stage=distill", "checkpoint=SR-001", "train.lr=1e-3,2e-3"]
    for words in (kills.TINY, sweep, export, export, ["stage=report"]):
        code, out, err = launching.Launch(there, *words, before=windows.without).ended()
        assert (code, err) == (0, ""), out
    quant = json.loads((there / "SR-001" / "result.json").read_text())["quant"]
    assert (quant["preset"], quant["mlp_layers"], quant["attn_layers"]) == ("q2a16", 6, 0)  # attention stayed as it was
    assert len(files(there)) > 6 and files(there) == files(here)
    assert not [path for path in there.rglob(f"*{scratch.SUFFIX}")]


@pytest.mark.parametrize("missing", [(), ("preadv", "pwrite")])
def test_threads_read_and_write_a_file_at_places_of_their_own(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    path, length, parts = tmp_path / "file", 1000, 40
    content = bytes(range(256)) * (parts * length // 256 + 1)
    content = content[: parts * length]
    wrong = []
    with open(path, "w+b", buffering=0) as opened:
        file = system.Positioned(opened)

        def work(number):
            for index in range(number, parts, 4):
                file.write(memoryview(content)[index * length : (index + 1) * length], index * length)
                read = bytearray(length)
                if file.read_into(read, index * length) != length or read != content[index * length :][:length]:
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and path.read_bytes() == content
        assert file.read_into(bytearray(10), len(content) - 3) == 3
        assert file.read_into(bytearray(10), len(content)) == 0
