"""Files of engines and ours beside them, on the tiny model: made, measured, kept and told."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import engines
import pytest
import speeds
import torch

from qat import checkpoints
from qat.config import QuantConfig
from tests import tiny
from tests.export import engines as grids

pytest.importorskip("mlx_lm", reason="the engine mlx-lm is not installed: pip install -e '.[engines]'")

NAME = "mlx_2bit_g64"


@pytest.fixture
def options(teacher, cache, tmp_path):
    rows = [{"instruction": f"say {i}", "output": " ".join(["word"] * 40)} for i in range(20)]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    return argparse.Namespace(
        model=str(teacher.path),
        cache=str(cache.folder),
        evaluation=[str(tmp_path / "chat.json")],
        own=[],
        converted=[],
        trained=[],
        dwq=[],
        dwq_tokens=256,
        dwq_seconds=60.0,
        dwq_validation=256,
        dwq_rate=3e-4,
        speeds=[],
        threads=1,
        convert="fast",
        tokens=256,
        calibration_tokens=256,
        length=32,
        precision="fp32",
        micro_batch=4,
        outputs=str(tmp_path / "outputs"),
        json=str(tmp_path / "engines.json"),
        merge=[],
    )


@pytest.fixture
def run(options, monkeypatch):
    def command(**changes):
        asked = argparse.Namespace(**vars(options) | changes)
        monkeypatch.setattr(engines, "arguments", lambda: asked)
        engines.main()
        return {(row["name"], row["method"]): row for row in json.loads(Path(asked.json).read_text())}

    return command


@torch.no_grad()
def by_hand(teacher, checkpoint, ids_NL) -> float:
    """KL of a checkpoint's student in float64."""
    student = checkpoints.load(checkpoint, teacher, tiny.FP32)[0].double()
    exact, given = (
        model(ids_NL).logits[:, :-1].double().log_softmax(-1)
        for model in (teacher.load(torch.float64, tiny.CPU), student)
    )
    return float((exact.exp() * (exact - given)).sum(-1).mean())


def test_files_of_one_grid_are_measured_and_kept(run, options, capsys, monkeypatch):
    rows = run(own=[NAME], converted=[NAME], dwq=[NAME])
    own, ours, dwq = (rows[NAME, method] for method in (engines.OWN, engines.CONVERTED, engines.DWQ))
    folders = Path(options.outputs) / "artifacts" / "engines"
    for row, label in ((own, "own"), (ours, "ours"), (dwq, "dwq")):
        (file,) = folders.glob(f"{NAME}_{label}-*/*.safetensors")
        assert row["bytes"] == file.stat().st_size and row["engine"] == "MLX"
    assert abs(own["bytes"] - ours["bytes"]) < 0.01 * own["bytes"]
    (checkpoint,) = folders.glob(f"{NAME}_converted-*")
    work = engines.Work(options)
    assert ours["kl"] == pytest.approx(by_hand(work.folder, checkpoint, work.held_out["chat"]), rel=1e-3)
    assert dwq["trained_tokens"] == 256 and 0 < dwq["kl"] != own["kl"]
    told = capsys.readouterr().out
    assert f"| {NAME} | ours, converted | 0.0 | {ours['kl']:.3f} ({ours['kl'] / own['kl']:.2f}) |" in told
    assert "mlx_lm.dwq (256 tokens)" in told
    monkeypatch.setattr(engines, "student", None)  # nothing is measured twice
    assert run(own=[NAME], converted=[NAME], dwq=[NAME]) == rows


def test_dwq_ends_in_time_and_tells_what_it_read(run, options, capsys, monkeypatch):
    from peers import dwq

    monkeypatch.setitem(dwq.SETTINGS, "step_tokens", 64)
    rows = run(dwq=[NAME], dwq_seconds=0.0)
    assert rows[NAME, engines.DWQ]["trained_tokens"] == 64  # one step, in which kernels are compiled
    told = capsys.readouterr().out
    assert "Validation: it=0, loss=" in told and "mlx_lm.dwq, 2 bits: 1 steps, 64 tokens in" in told


def test_runs_of_one_preset_are_seeds_and_other_engines_have_their_own_files(run, teacher, cache, tmp_path, capsys):
    grid = grids.grid(4, 64, "integers")
    quant = QuantConfig("compressed_w4_g64", grid, grid)
    made = [grids.checkpoint(tmp_path / f"seed{seed}", teacher, cache, quant) for seed in (0, 1)]
    rows = run(trained=[f"compressed_w4_g64={path}" for path in made], own=["gguf_q4_0"], converted=["gguf_q4_0"])
    trained, ours = rows["compressed_w4_g64", engines.TRAINED], rows["gguf_q4_0", engines.CONVERTED]
    assert (trained["seeds"], trained["engine"], ours["engine"]) == (2, "compressed-tensors", "llama.cpp")
    assert 0 < trained["kl"] < 1 and 0 < ours["kl"] < 1
    told = capsys.readouterr().out
    if find_spec("llama_cpp") is None:
        assert f"gguf_q4_0, {engines.OWN} was left out: llama.cpp's own quantizer cannot run here" in told
    else:
        assert 0 < rows["gguf_q4_0", engines.OWN]["kl"] < 1


def test_speeds_are_ratios_of_one_run(run, monkeypatch, capsys):
    monkeypatch.setattr(speeds, "WRITTEN", 3)
    monkeypatch.setattr(speeds, "TURNS", 2)
    rows = run(speeds=[NAME])
    own, ours, packed = (rows[NAME, method] for method in (engines.OWN, engines.OURS, engines.PACKED))
    assert set(ours["ratios"]) == {engines.OWN, engines.PACKED} and ours["tokens_per_second"] > 0
    assert own["settings"] == packed["settings"] and own["settings"]["written"] == 3
    monkeypatch.setattr(speeds, "measure", None)  # nothing is measured twice
    assert run(speeds=[NAME]) == rows


def test_a_ratio_is_the_median_over_turns(monkeypatch):
    monkeypatch.setattr(speeds, "TURNS", 3)
    seconds = iter([9, 9, 1, 2, 4, 4, 2, 6])  # a turn to warm up, then three of two files
    clock = [0.0]
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: clock[0])

    def write():
        clock[0] += next(seconds)

    found = speeds.measure({"one": write, "other": write})
    assert found["one"] == {"tokens_per_second": 32.0, "ratios": {"other": 2.0}}
    assert found["other"] == {"tokens_per_second": 16.0, "ratios": {"one": 0.5}}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"trained": ["mlx_2bit_g64"]}, "--trained mlx_2bit_g64 is not name=path"),
        ({"trained": ["q2a4=SR-001"]}, "quant=q2a4 is on no engine's grid"),
        ({"converted": ["q2a4"]}, "quant=q2a4 is on no engine's grid: presets of engines begin with gguf_…, mlx_…, "),
        ({"dwq": ["gguf_q4_0"]}, "--dwq gguf_q4_0: mlx_lm.dwq trains grids of MLX, such as mlx_4bit_g64"),
        (
            {"speeds": ["compressed_w4_g64"]},
            "--speeds compressed_w4_g64: of these engines gguf and mlx run on processors",
        ),
    ],
)
def test_what_cannot_be_is_told(run, asked, told):
    with pytest.raises(SystemExit, match=told):
        run(**asked)
