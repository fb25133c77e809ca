"""What --help says of a group, a section or a key."""

import subprocess
import sys
from pathlib import Path

import pytest

from qat import options
from qat.cli import helping, schema
from qat.cli.helping import page
from qat.config import Stage
from qat.errors import ConfigError


@pytest.mark.parametrize("group", [*schema.groups(), *schema.EXTRAS])
def test_a_group_shows_its_options_and_keys(group):
    said = page([group])
    for option in options.files(group):
        assert f" {option.stem} " in said and helping.describe(option) in said
    for name, key in schema.keys().items():
        if name.startswith(f"{group}.") and not key.is_section and name != f"{group}.name":
            assert name in said and key.comment in said


def test_only_the_default_is_marked():
    options = page(["quant"]).partition("\nKeys")[0]
    assert [line.split()[1] for line in options.splitlines() if line.startswith("   * ")] == ["q2a4"]


def test_a_key_says_what_it_takes():
    assert "train.lr=0.001" in page(["train.lr"]) and "(a number, above 0)" in page(["train.lr=3e-4"])
    assert "quant.mlp.bits=<int>" in page(["quant"]) and "at least 1 and at most 8" in page(["quant.mlp"])


def test_words_of_a_key_are_explained():
    said = page(["stage"])
    for stage in Stage:
        assert f"{stage.name:<16} {stage.value}" in said


def test_several_topics():
    assert page(["mode", "loss"]) == page(["mode"]) + "\n\n" + page(["loss"])


def test_every_key_has_a_comment_in_the_words_of_the_command_line():
    for name, key in schema.keys().items():
        if name.rpartition(".")[2] != "name":
            assert key.comment, name
        assert "None" not in key.comment


def test_no_such_topic():
    with pytest.raises(ConfigError, match=r"--help trian: .*did you mean train\?"):
        page(["trian"])


def test_a_topic_in_a_process_imports_no_torch_and_claims_nothing(launch_alone, here):
    done = launch_alone("--help", "quant", "train.lr")
    assert (done.code, done.err, done.heavy) == (0, "", [])
    assert "q3a4_r8" in done.out and "train.lr=0.001" in done.out
    assert list(here.iterdir()) == []


def test_a_reader_may_stop_early():
    launch = Path(__file__).resolve().parents[2] / "launch.py"
    helped = subprocess.Popen([sys.executable, str(launch), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert helped.stdout and helped.stderr
    helped.stdout.close()
    assert helped.stderr.read() == b""
    assert helped.wait(timeout=60) == 0
