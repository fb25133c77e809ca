"""Options of a person's own: found in three places, known to help, Tab and errors, and never in place of ours."""

import os
import sys

import pytest

from qat import installation, options
from qat.cli import arguments, main
from qat.cli.completion import complete
from qat.cli.helping import describe, page
from qat.config import CONF
from qat.errors import ConfigError

MINE = "# mine alone\nmlp: {bits: 2, rank: 16}\nattn: null\n"
LONG = "# a long training\nsteps: 1234\n"
PRESET = "# @package _global_\n# all of mine\ndefaults: [{override /quant: mine}]\ntrain: {steps: 77}\n"


@pytest.fixture
def write(here):
    def at(folder):
        for name, text in (("quant/mine", MINE), ("train/long", LONG), ("recipe/whole", PRESET)):
            (here / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (here / folder / f"{name}.yaml").write_text(text)
        return here / folder

    return at


@pytest.fixture(params=["beside", "flag", "variable"])
def words(request, write, here, monkeypatch):
    """Words that a command needs beside, for own options in each place."""
    if request.param == "variable":
        write("far/away")
        (here / "other").mkdir()
        monkeypatch.setenv("QAT_CONF", os.pathsep.join([str(here / "other"), str(here / "far" / "away")]))
        return []
    write("conf" if request.param == "beside" else "folder")
    return ["--config-dir", "folder"] if request.param == "flag" else []


def test_options_are_taken_alone_and_together(words, compose):
    assert compose(*words, "quant=mine", "mode=mlp").quant.mlp.rank == 16
    assert compose(*words, "quant=mine", "mode=mlp").quant.name == "mine"
    assert compose(*words, "+train=long").train.steps == compose(*words, "train=long").train.steps == 1234
    whole = compose(*words, "recipe=whole", "mode=mlp", "train.lr=1e-3")
    assert (whole.quant.name, whole.train.steps, whole.train.lr) == ("mine", 77, 1e-3)
    assert compose(*words).quant.name == "q2a4"


def test_hydra_finds_them_too(words, launch, here):
    done = launch(*words, "quant=mine", "mode=mlp", "+train=long")
    assert (done.code, done.err, done.ran) == (0, "", ["SR-001"])
    assert "rank: 16" in (here / "outputs/SR-001/config_resolved.yaml").read_text()


def test_help_tab_and_errors_know_them(words, capfd):
    arguments.parse([*words, "--help"])
    said = page([])
    assert "mine alone [" in " ".join(said.split()) and "a long training" in said
    assert "  recipe: presets, as in +recipe=<name>" in said and "all of mine" in said
    assert "mine alone" in page(["quant"]) and "all of mine" in page(["recipe"])
    line = " ".join(["qat", *words, "quant=mi"])
    assert complete(line) == ["quant=mine"]
    assert complete(line.replace("quant=mi", "rec")) == ["recipe="]
    assert complete(line.replace("quant=mi", "+train=l")) == ["+train=long"]
    for mistake, nearest in (("quant=mien", "mine"), ("recipes=whole", "recipe"), ("mine", "quant=mine")):
        assert main.main([*words, mistake], lambda: pytest.fail("launched")) == 2
        assert f"did you mean {nearest}?" in capfd.readouterr().err


def test_a_sweep_runs_over_ours_and_ones_own(write, launch, here):
    write("folder")
    done = launch("--config-dir", "folder", "-m", "quant=q2a4,mine", "mode=mlp")
    assert (done.code, done.ran) == (0, ["SR-001", "SR-002"])


def test_one_name_for_two_options_is_refused_where_it_is_used(write, compose, here):
    own = write("conf")
    (own / "quant" / "q4a4.yaml").write_text(MINE)
    (own / "quant" / "q2a4.yaml").write_text((CONF / "quant" / "q2a4.yaml").read_text())
    assert compose("quant=q2a4").quant.name == "q2a4"
    with pytest.raises(ConfigError, match=r"quant=q4a4 is two options, .*conf/quant/q4a4.yaml and .*another name"):
        compose("quant=q4a4")
    (write("more") / "quant" / "mine.yaml").write_text("mlp: {bits: 3}\nattn: null\n")
    with pytest.raises(ConfigError, match="quant=mine is two options"):
        compose("--config-dir", "more", "quant=mine", "mode=mlp")


def test_a_primary_configuration_beside_is_not_ours(write, compose):
    (write("conf") / "config.yaml").write_text("train: {steps: 1}\n")
    assert compose().train.steps != 1


def test_what_a_run_left_is_no_option_here_either(write, here, monkeypatch, compose):
    monkeypatch.chdir(write("outputs/SR-001/conf").parent)
    assert compose().quant.name == "q2a4"
    with pytest.raises(ConfigError, match="which is data"):
        compose("quant=mine", "mode=mlp")


def test_a_folder_that_is_not_there_is_told(here, monkeypatch, capfd):
    monkeypatch.setenv("QAT_CONF", "gone")
    assert main.main([], lambda: pytest.fail("launched")) == 2
    assert capfd.readouterr().err == "error: QAT_CONF=gone: no such folder: gone\n"


def test_files_that_nobody_can_read_spoil_no_help(write, compose):
    own = write("conf")
    (own / "quant" / "odd.yaml").write_bytes(b"\xff\xfe: [")
    (own / "checkpoint").mkdir()
    (own / "checkpoint" / "odd.yaml").write_text("a: [")
    assert "odd" in page([])
    with pytest.raises(ConfigError):
        compose("quant=odd")
    with pytest.raises(ConfigError, match="no such folder or file"):
        compose("stage=evaluate", "checkpoint=nothing")


def test_an_own_checkpoint_is_known_by_its_name(write, compose, here):
    own = write("conf")
    (own / "checkpoint").mkdir()
    (own / "checkpoint" / "ours.yaml").write_text("archive: SR-009_ours_fp32\n")
    with pytest.raises(ConfigError, match=r"did you mean ours\?"):
        compose("stage=evaluate", "checkpoint=our")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("/usr/bin/qat", "qat"),
        ("launch.py", "python launch.py"),
        (str(installation.PACKAGE / "__main__.py"), "python -m qat"),
        ("/somewhere/pytest", "python launch.py"),
        ("", "python launch.py"),
    ],
)
def test_what_was_typed_is_what_is_advised(script, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    assert installation.command() == said
    assert f"\n  {said} stage=doctor  " in page([])
    words, told = installation.again()
    monkeypatch.setattr(sys, "argv", [str(installation.PACKAGE / "__main__.py")])
    monkeypatch.setenv(installation.STARTED_AS, told[installation.STARTED_AS])
    assert words[1:] == ["-P", "-m", "qat"] and installation.command() == said


def test_options_of_the_package_are_not_read_twice(monkeypatch):
    monkeypatch.chdir(CONF.parent)
    monkeypatch.setenv("QAT_CONF", str(CONF))
    assert options.own() == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {tokens: 9}", r"unknown key data.tokens \(did you mean data\.\w+\?\)"),
        ("train: {steps: 9, lrr: 1}", r"unknown key train.lrr \(did you mean train.lr\?\)"),
        ("trian: {steps: 9}", r"unknown key trian \(did you mean train\?\)"),
    ],
)
def test_a_wrong_key_in_an_own_file_is_told_with_its_section(write, compose, text, told):
    (write("conf") / "recipe" / "whole.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError, match=f"^In 'recipe/whole': {told}"):
        compose("recipe=whole")


def test_the_folder_of_a_model_is_no_option_and_the_message_says_what_it_is(compose, here):
    (here / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"; for the folder of that name write model=local model.path=mine;"):
        compose("model=mine")


def test_an_option_with_a_long_name_has_its_description_below_it_in_the_column_of_all(write, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (write("conf") / "quant" / "a_name_of_more_than_its_column.yaml").write_text("# ones own\nname: long\n")
    lines = page(["quant"]).splitlines()
    place = lines.index("     a_name_of_more_than_its_column")
    assert lines[place + 1].startswith(f"{'':24}ones own [")
    for option in (CONF / "quant").glob("*.yaml"):
        assert f"{option.stem:<19}{describe(option)}" in [line[5:] for line in lines]
