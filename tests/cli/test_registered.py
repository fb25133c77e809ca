"""A registered checkpoint that is nowhere is refused in one sentence, with exit code 1 and nothing created."""

import json

import pytest

from qat.cli import main
from tests import described

REFUSED = [
    ("checkpoint=q4_fp32", "fetch it with stage=pull checkpoint=q4_fp32 store=<gdrive"),
    ("+experiment=sr_001", "checkpoint=q4_fp32"),
    ("checkpoint=Q2_0.5341", "stage=pull checkpoint=q2_0_5341"),
    ("checkpoint=anemll_v2_q4_a4_ste_fp16_from_v1.tgz", "stage=pull checkpoint=q4_fp16"),
    ("checkpoint=Q2A4_BINIT_0.5855/best_state_dict.pt", "stage=pull checkpoint=q2_binit_0_5855"),
    ("stage=evaluate evaluate.against=[q2_init]", "stage=pull checkpoint=q2_init"),
    ("stage=distill checkpoint={checkpoint} cache=alpaca_L64 loss=topk_kl", "stage=pull cache=alpaca_L64"),
    ("cache=local cache.path=alpaca_chat_think_both_L128_K128_R1024", "stage=pull cache=alpaca_L128"),
]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(described.checkpoint()))
    return folder


@pytest.mark.parametrize(("line", "says"), REFUSED)
def test_refused_in_one_line(line, says, checkpoint, tmp_path, capsys):
    argv = line.format(checkpoint=checkpoint, folder=tmp_path).split()
    code = main.main([*argv, f"outputs={tmp_path}/outputs"], lambda: pytest.fail("a job was started"))
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith("error: ") and says in error
    assert not (tmp_path / "outputs").exists()


def test_a_checkpoint_with_the_configured_formats_may_be_trained(checkpoint):
    checked = main.check(main.arguments.parse([f"checkpoint={checkpoint}", "quant=q2a4"]))
    assert checked.configs[0].checkpoint.path == str(checkpoint)
