"""A registered checkpoint that is nowhere is refused in one sentence, with exit code 1 and nothing created."""

import json

import pytest

from qat.cli import main

REFUSED = [
    ("checkpoint=q4_fp32", "checkpoints/q4_fp32: put it there, or name the store that has it"),
    ("+experiment=sr_001", "checkpoint=q4_fp32"),
]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    quant = {"name": "q2a4", "mlp": {"bits": 2, "rank": 32}, "attn": {"bits": 4, "rank": 8}}
    (folder / "manifest.json").write_text(json.dumps({"kind": "checkpoint", "model": "tiny", "quant": quant}))
    return folder


@pytest.mark.parametrize(("line", "says"), REFUSED)
def test_refused_in_one_line(line, says, checkpoint, tmp_path, capsys):
    argv = line.format(checkpoint=checkpoint, folder=tmp_path).split()
    code = main.main([*argv, f"outputs={tmp_path}/outputs"], lambda: pytest.fail("a job was started"))
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith("error: ") and says in error
    assert not (tmp_path / "outputs").exists()


def test_a_checkpoint_with_the_configured_tables_may_be_trained(checkpoint):
    checked = main.check(main.arguments.parse([f"checkpoint={checkpoint}", "quant=q2a4"]))
    assert checked.configs[0].checkpoint.path == str(checkpoint)
