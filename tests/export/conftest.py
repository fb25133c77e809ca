"""A trained-looking checkpoint in a run's folder, and exports of it through the stage itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qat import checkpoints
from qat.config import (
    CheckpointConfig,
    Config,
    ExportConfig,
    ExportType,
    InstanceConfig,
    ModelConfig,
    ModelSource,
    QuantConfig,
    Stage,
    TrackerConfig,
    TrackerKind,
)
from qat.quant.linear import quantized
from qat.stages import run_job
from tests import tiny

IDS = torch.arange(60).reshape(3, 20)


@pytest.fixture(scope="session")
def run_folder(teacher, cache, tmp_path_factory) -> Path:
    """A run whose best checkpoint has scales that training moved."""
    run = tmp_path_factory.mktemp("runs") / "SR-007"
    best = tiny.checkpoint_in(run / "checkpoints" / "best", teacher, cache)
    student, manifest = checkpoints.load(best, teacher, tiny.FP32)
    draw = torch.Generator().manual_seed(0)
    for module in quantized(student).values():
        module.scale_A.mul_(torch.rand(module.scale_A.shape[1], generator=draw) + 0.5)
    checkpoints.save(student, best, checkpoints.heritage(manifest))
    record = {"name": "v2_q2a4_mlp_0.58_fp32", "run_id": "SR-007", "metrics": {"kl": 0.123456, "perplexity": None}}
    config = {"mode": {"name": "mlp"}, "train": {"steps": 77, "lr": 0.001, "batch_size": 4}}
    (run / "result.json").write_text(json.dumps(record | {"config": config}))
    return run


@pytest.fixture(scope="session")
def best(run_folder) -> Path:
    return run_folder / "checkpoints" / "best"


@pytest.fixture(scope="session")
def student(best, teacher):
    return checkpoints.load(best, teacher, tiny.FP32)[0]


@pytest.fixture
def export(tmp_path):
    """Runs `stage=export` of a checkpoint (None is the teacher); returns the export's folder."""

    def run(
        checkpoint: Path | None, name: str, dtype: str = "fp32", output: Path | None = None, **changes: Any
    ) -> Path:
        folder = output or tmp_path / "exports" / f"{name}-{dtype}"
        config = Config(
            stage=Stage.export,
            outputs=str(tmp_path / "outputs"),
            model=ModelConfig(name="tiny", source=ModelSource.tiny),
            quant=QuantConfig(name="q2a4"),
            checkpoint=CheckpointConfig(name="local", path=checkpoint and str(checkpoint)),
            instance=InstanceConfig(name="cpu"),
            tracker=TrackerConfig(name="none", kind=TrackerKind.none),
            export=ExportConfig(name, name, ExportType[dtype], output=str(folder), **changes),
        )
        record = tmp_path / f"SR-{len(list(tmp_path.glob('SR-*'))) + 1:03d}"
        record.mkdir()
        run_job(config, record)
        return folder

    return run


# Forks a process for each line that it reads, which then does what `python -P FILE ARGUMENTS` does. It has imported
# what takes transformers most of its start, and neither transformers nor anything of ours.
SERVER = """
import json, os, runpy, signal, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor, torch.export, torch.fx.experimental.symbolic_shapes
import accelerate, huggingface_hub, jinja2, regex, safetensors.torch, sentencepiece, tokenizers, yaml, PIL.Image
import huggingface_hub.hf_api, torch.distributed.checkpoint, torch.nn.attention.flex_attention
for line in sys.stdin:
    words, path, home = json.loads(line)
    process = os.fork()
    if not process:
        code = 1
        signal.alarm(300)
        try:
            os.chdir(home)
            for number in (1, 2):
                os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.argv, sys.path[:0] = words, path
            assert not {"qat", "transformers"} & set(sys.modules)
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def server() -> Iterator["subprocess.Popen[str]"]:
    """Where such processes come from."""
    environment = {**os.environ, "PYTHONPATH": ""}
    ends: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-P", "-c", SERVER], **ends) as process:
        yield process


@pytest.fixture
def elsewhere(tmp_path, server):
    """Runs code in a process of its own, in an empty folder; returns its exit code and output."""

    def run(code: str, *argv: str, path: str = "") -> tuple[int, str]:
        home = tmp_path / "elsewhere"
        home.mkdir(exist_ok=True)
        (home / "code.py").write_text(code)
        (home / "said").write_text("")
        words = ["code.py", *map(str, argv)]
        server.stdin.write(json.dumps([words, [path] if path else [], str(home)]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), (home / "said").read_text()

    return run
