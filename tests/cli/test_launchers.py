"""Sweeps in parallel through Hydra's launchers, tried for real where their packages are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.partition=gpu"]),
    "ray": ("hydra_plugins.hydra_ray_launcher", ["+hydra.launcher.ray.init.num_cpus=2"]),
}
# As much of Slurm as its launcher asks for: a job array that starts at once, on this host.
SLURM = {
    "sbatch": """
script=${@: -1}
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export SLURM_ARRAY_JOB_ID=41 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
for i in $(seq 0 "$last"); do
    SLURM_JOB_ID=$((41 + i)) SLURM_ARRAY_TASK_ID=$i bash "$script" < /dev/null > /dev/null 2>&1 &
done
cp "$script" "$(dirname "$0")/submitted"
echo Submitted batch job 41
""",
    "srun": """
while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
exec "$@"
""",
    "sacct": "echo 'JobID|State|NodeList'",
}


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """Puts the commands of Slurm first on the path; returns their folder."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, script in SLURM.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.mark.parametrize("name", LAUNCHERS)
def test_jobs_run_in_processes_of_their_own(tmp_path, slurm, name):
    module, settings = LAUNCHERS[name]
    pytest.importorskip(module)
    words = ["-m", "+debug=tiny", "stage=cache", "data.documents=64,72", f"hydra/launcher={name}", *settings]
    command = [sys.executable, str(ROOT / "launch.py"), *words, f"outputs={tmp_path}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("sweep-001/*/result.json")}
    assert {name: result["status"] for name, result in found.items()} == {"SR-001": "complete", "SR-002": "complete"}
    assert [found[f"SR-00{i}"]["config"]["data"]["documents"] for i in (1, 2)] == [64, 72]
    assert found["SR-001"]["command"].startswith("python launch.py -m +debug=tiny")
    assert (tmp_path / "RUNS.md").read_text().count("### SR-00") == 2
    if name == "submitit_slurm":
        assert "#SBATCH --partition=gpu" in (slurm / "submitted").read_text()


def test_settings_of_slurm_compose(here):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1"]
    words += ["hydra.launcher.timeout_min=600", "hydra.launcher.mem_gb=32"]
    words += ["+hydra.launcher.additional_parameters.nice=1"]
    command = [sys.executable, str(ROOT / "launch.py"), "+debug=tiny", *words]
    done = subprocess.run([*command, "--cfg", "hydra"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    launcher = yaml.safe_load(done.stdout)["hydra"]["launcher"]
    assert launcher["_target_"].endswith("SlurmLauncher")
    told = {name: launcher[name] for name in ("partition", "gpus_per_node", "timeout_min", "mem_gb")}
    assert told == {"partition": "gpu", "gpus_per_node": 1, "timeout_min": 600, "mem_gb": 32}
    assert launcher["additional_parameters"] == {"nice": 1}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_that_is_not_installed_is_named(name, here, capfd):
    from qat.cli import main

    try:
        __import__(LAUNCHERS[name][0])
    except ImportError:
        assert (
            main.main(["-m", "+debug=tiny", "seed=1,2", f"hydra/launcher={name}"], lambda: pytest.fail("launched")) == 1
        )
        assert "is not installed: pip install -e" in capfd.readouterr().err
        assert not list(here.iterdir())


GPU = """
import os, sys, time
from qat import gpus
gpus.take_one(int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def test_every_process_gets_a_gpu_of_its_own_and_then_they_are_shared(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,2,GPU-abc", "TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", GPU, str(i)], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
        )
        for i in range(3)
    ]
    taken = [worker.stdout.readline().strip() for worker in workers]
    assert sorted(taken) == ["0", "2", "GPU-abc"]
    late = subprocess.run([sys.executable, "-c", GPU, "4"], cwd=ROOT, env=environment, input="", stdout=pipe, text=True)
    assert late.stdout.strip() == "2"  # all are taken: the fourth place, round and round
    for worker in workers:
        worker.communicate("")
    again = subprocess.run(
        [sys.executable, "-c", GPU, "7"], cwd=ROOT, env=environment, input="", stdout=pipe, text=True
    )
    assert again.stdout.strip() == "0"  # a lock ends with its process
