"""Faults of the machine, most of them in real processes: one sentence, nothing half-made, what is complete is kept."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat import faults, records, runs
from qat.artifacts import hashed, open_artifact, publish
from qat.config import Config, ModeConfig, QuantConfig, TrackerConfig, TrackerKind
from qat.distill import step
from qat.errors import MachineError
from tests.launching import Launch

TINY = ("+debug=tiny", "quant=q2a16", "data.documents=64", "instance.precision=fp32", "evaluate.sample_tokens=1")
BIG = {"a": torch.zeros(1 << 18)}
LONG = (*TINY, "train.steps=100000", "train.eval_every=50000")


def results(outputs):
    return [json.loads(path.read_text()) for path in sorted(outputs.glob("SR-*/result.json"))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An outputs folder with everything that a second tiny run needs."""
    outputs = tmp_path_factory.mktemp("made") / "outputs"
    code, _, err = Launch(outputs, *TINY).ended()
    assert (code, err) == (0, "")
    return outputs


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("small_disk", "words", "said"),
    [
        ("2m", ["stage=cache", "data.documents=128", "cache.top_k=256", "cache.random=256"], "are free there"),
        ("900k", [], "the disk is full"),
    ],
    indirect=["small_disk"],
)
def test_full_disk_is_told_and_leaves_nothing_half_made(small_disk, words, said, tmp_path):
    outputs = small_disk / "outputs"
    code, _, err = Launch(outputs, *TINY, *words).ended()
    assert code == 1
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    for folder in outputs.glob("artifacts/*/[!.]*"):
        if folder.is_dir():
            open_artifact(shutil.copytree(folder, tmp_path / "copies" / folder.name))  # opening writes a note
    assert results(outputs)[0]["status"] in ("failed", "interrupted")


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
@pytest.mark.parametrize("write", [lambda path: path.write_bytes(bytes(1 << 20)), lambda path: save_file(BIG, path)])
def test_full_disk_leaves_an_older_export_in_its_place(small_disk, write):
    place = small_disk / "export"
    with publish(place, {}) as (made, _):
        (made / "x").write_text("older")
    with pytest.raises(MachineError, match=f"^the disk is full at {place}: "), publish(place, {}) as (made, _):
        write(made / "x")
    open_artifact(place)
    assert (place / "x").read_text() == "older" and [path.name for path in small_disk.iterdir()] == ["export"]


def test_read_only_outputs_are_refused_before_anything_starts(tmp_path):
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(outputs)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        code, out, err = Launch(outputs, *TINY).ended()
    finally:
        subprocess.run(["umount", "-l", str(outputs)], check=True)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: outputs={outputs}")


def test_sigterm_is_recorded(made):
    before = len(results(made))
    launch = Launch(made, *LONG)
    launch.wait_for(lambda: any(path.stat().st_size > 2000 for path in made.glob("SR-*/metrics.jsonl")))
    launch.send(signal.SIGTERM)
    code, _, err = launch.ended()
    assert (code, err) == (143, "interrupted\n")
    (result,) = results(made)[before:]
    assert result["status"] == "interrupted"
    assert f"### {result['run_id']}" in (made / "RUNS.md").read_text()


def test_two_processes_that_want_one_artifact_make_it_once(tmp_path):
    outputs = tmp_path / "outputs"
    both = [Launch(outputs, *TINY, "stage=convert") for _ in range(2)]
    said = [launch.ended() for launch in both]
    assert [(code, err) for code, _, err in said] == [(0, "")] * 2
    assert {result["run_id"]: result["status"] for result in results(outputs)} == {
        "SR-001": "complete",
        "SR-002": "complete",
    }
    for kind in ("models", "documents", "caches", "checkpoints"):
        (folder,) = (path for path in (outputs / "artifacts" / kind).iterdir() if path.is_dir())
        open_artifact(folder)
    log = (outputs / "RUNS.md").read_text()
    assert log.count("### SR-00") == 2 and log.count("· complete") == 2


def no_memory():
    def attempt(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    step.Step._attempt = attempt


def test_memory_that_runs_out_is_told_with_a_remedy(made):
    code, _, err = Launch(made, *TINY, "instance.micro_batch=1", before=no_memory).ended()
    assert code == 1
    assert err.startswith("error: ") and "memory" in err and err.count("\n") == 1
    assert results(made)[-1]["status"] == "failed"


def test_allocator_of_the_cpu_is_understood():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "out of memory" in str(faults.explain(raised.value))


@pytest.mark.parametrize("number", sorted(faults.DISK))
def test_errors_of_the_disk_are_sentences(number):
    told = faults.explain(OSError(number, os.strerror(number), "/there/x"))
    assert isinstance(told, MachineError)
    assert str(told).startswith(f"{faults.DISK[number]} at /there/x: ")


def test_errors_of_the_disk_are_known_behind_safetensors():
    from safetensors import SafetensorError

    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert str(faults.explain(error)).startswith("the disk is full: ")


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("errno 28"), OSError(errno.ENOENT, "no"), RuntimeError("shape")]
)
def test_defects_stay_defects(error):
    assert faults.explain(error) is None


def test_clock_set_back_changes_no_order_and_no_time(tmp_path, monkeypatch):
    hours = iter(["2026-11-22T12:00:00+0000", "2026-11-22T09:00:00+0000"])
    clock = SimpleNamespace(monotonic=time.monotonic, strftime=lambda _: next(hours))
    monkeypatch.setattr(runs, "time", clock)
    for _ in range(2):
        folder = tmp_path / runs.claim_run(tmp_path)
        folder.mkdir()
        config = Config(outputs=str(tmp_path), quant=QuantConfig("q2a4"), mode=ModeConfig("mlp", True, False))
        config.tracker = TrackerConfig("none", TrackerKind.none)
        runs.Run(config, folder).finish("complete")
    found = records.runs(tmp_path)
    assert [(run.run_id, run.text("started")[11:13]) for run in found] == [("SR-001", "12"), ("SR-002", "09")]
    assert all(run.number("timing", "total_s") >= 0 for run in found)


@pytest.mark.parametrize(
    ("pattern", "harm"),
    [
        ("SR-001/checkpoints/best/tables.safetensors", "bit flipped"),
        ("artifacts/caches/*/train-*.safetensors", "cut short"),
    ],
)
def test_damaged_file_is_told(made, pattern, harm):
    path = next(made.glob(pattern))
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes(whole[:middle] if harm == "cut short" else flipped)
    try:
        code, _, err = Launch(made, *TINY, "stage=evaluate", "checkpoint=SR-001").ended()
    finally:
        path.write_bytes(whole)
    assert (code, err.count("\n")) == (1, 1)
    assert str(path) in err and ("bytes instead of" if harm == "cut short" else "was altered") in err


def edited(path, change):
    """Changes the JSON in a file; returns its bytes from before."""
    whole = path.read_bytes()
    said = json.loads(whole)
    change(said)
    path.write_text(json.dumps(said))
    return whole


def test_damaged_manifest_is_told_before_anything_starts(made):
    path = made / "SR-001" / "checkpoints" / "best" / "manifest.json"
    whole = edited(path, lambda said: next(iter(said["layers"].values())).update(bits=0))
    try:
        code, _, err = Launch(made, *TINY, "stage=evaluate", "checkpoint=SR-001").ended()
    finally:
        path.write_bytes(whole)
    assert (code, err.count("\n")) == (2, 1)
    assert str(path) in err and "bits is 0, and a whole number from 1 to 8 belongs there" in err


def test_numbers_that_are_none_in_a_cache_are_told(made):
    path = next(made.glob("artifacts/caches/*/train-00000.safetensors"))
    manifest, whole = path.parent / "manifest.json", path.read_bytes()
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    tensors = load_file(path)
    tensors["topk_logprobs"][1, 2, 3] = torch.nan
    save_file(tensors, path, metadata=said)
    entry = {path.name: {"bytes": path.stat().st_size, "sha256": hashed([path])[0]}}
    listed = edited(manifest, lambda said: said["files"].update(entry))
    try:
        code, _, err = Launch(made, *TINY).ended()
    finally:
        path.write_bytes(whole)
        manifest.write_bytes(listed)
    assert (code, err.count("\n")) == (1, 1)
    assert "NaN or infinity is among the log-probabilities in row 1 of train-00000.safetensors" in err


def test_a_run_that_learns_nothing_has_failed(made):
    code, _, err = Launch(made, *TINY, "train.lr=1e-30").ended()
    assert (code, err.count("\n")) == (1, 1) and "steps have changed nothing" in err
    assert results(made)[-1]["status"] == "failed" and "changed nothing" in results(made)[-1]["error"]


def test_teacher_that_is_not_there_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama", "vocab_size": 49152}')
    words = ("model=local", f"model.path={tmp_path / 'empty'}", "tracker=none")
    code, _, err = Launch(tmp_path / "outputs", *words).ended()
    assert (code, err.count("\n")) == (2, 1) and err.startswith("error: ")
    assert str(tmp_path / "empty") in err and not (tmp_path / "outputs").exists()


def test_store_that_vanished_is_told(tmp_path):
    words = ("checkpoint=q4_fp32", "store=gdrive", f"store.path={tmp_path / 'gone'}")
    code, _, err = Launch(tmp_path / "outputs", *TINY, *words).ended()
    assert (code, err.count("\n")) == (1, 1)
    assert "not there" in err and str(tmp_path / "gone") in err
