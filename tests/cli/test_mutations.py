"""Broken command lines by the hundred: never a traceback, never anything created."""

import random

from qat.cli import arguments, main, sweeping
from qat.errors import QatError

LINES = [
    "quant=q2a4 mode=mlp",
    "stage=convert checkpoint=q4_fp32 quant=q2a4 cache=L64",
    "stage=distill checkpoint=q2_init mode=mlp train.steps=2000",
    "stage=evaluate checkpoint=outputs/SR-001/checkpoints/best",
    "stage=export checkpoint=teacher export=hf export.output=there",
    "-m train.lr=1e-4,3e-4 quant=q2a4,q4a4",
    "+experiment=sr_001 seed=3",
    "model=tiny cache.top_k=8 cache.random=8 data.thinking=both",
    "--cfg job --resolve train={lr:0.1,steps:3}",
    "--config-path conf --config-name config loss=topk_kl",
    "hydra.run.dir=x train.steps=1e3 run.goal='a b'",
    "stage=pull store=gdrive store.path=nowhere/x checkpoint=q4_fp32",
    "stage=push store=url store.path=file:///nowhere/x store.archive=mine checkpoint=teacher",
    "-m sweep.resume=outputs/sweep-001 hydra/launcher=joblib instance=cpu",
    "-m hydra.sweep.dir=y loss=topk_kl,full_kl store.mirror=true store=gdrive",
]
TYPED = "=,.+~@:/'\"\\[]{}()$-_ \t*%#0a"
NOISE = [*TYPED, "${", "}}", "null", "???", "--", "1e9", "é", "[" * 50, "range(1,9)"]


def mutate(line: str, dice: random.Random) -> str:
    """One to three small accidents: a letter lost, doubled, swapped, or something strange typed."""
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(line))
        line = (
            dice.choice(
                [
                    line[:at] + line[at + 1 :],
                    line[:at] + line[at] + line[at:],
                    line[:at] + line[at + 1 : at + 2] + line[at] + line[at + 2 :],
                    line[:at] + dice.choice(NOISE) + line[at:],
                    line[:at] + dice.choice(NOISE) + line[at + 1 :],
                    line[:at],
                ]
            )
            or "x"
        )
    return line


def test_mutated_command_lines(here, capfd):
    dice = random.Random(0)
    refused = 0
    for _ in range(200):
        line = mutate(dice.choice(LINES), dice)
        try:
            command = arguments.parse(line.split(" "))
            if sweeping.resumed(command) is None:
                main.check(command)
        except QatError as error:
            refused += 1
            assert str(error).strip(), line
        except SystemExit as stopped:  # --version
            assert stopped.code == 0, line
    assert refused > 100
    assert list(here.iterdir()) == []
