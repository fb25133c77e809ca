"""What --help says of a group, a section or a key."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from omegaconf import MISSING
from rich.cells import cell_len

from qat import installation, options
from qat.cli import arguments, helping, schema
from qat.cli.helping import page
from qat.config import Stage
from qat.errors import ConfigError

TOPICS = [*schema.keys(), *schema.presets(), *(f"stage={stage.name}" for stage in Stage)]
STARTED = {"qat": "qat", "launch.py": "python launch.py", str(installation.PACKAGE / "__main__.py"): "python -m qat"}


def flat(text: str) -> str:
    """Text without the breaks of its lines."""
    return " ".join(text.split())


@pytest.mark.parametrize("script", STARTED)
@pytest.mark.parametrize("columns", [80, 60, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_left_out(monkeypatch, script, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.argv", [script])
    whole = page([])
    widest = max(whole.splitlines(), key=cell_len)
    assert cell_len(widest) <= columns and (columns < 200 or cell_len(widest) > 100)
    for words, meaning in helping.EXAMPLES.items():
        assert flat(f"{STARTED[script]} {words} {meaning}") in flat(whole)
    for stage in Stage:
        assert f"stage={stage.name} {stage.value}" in flat(whole)


@pytest.mark.parametrize("topic", TOPICS)
def test_no_line_on_a_topic_is_wider_than_a_terminal(monkeypatch, topic):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(cell_len, page([topic]).splitlines())) <= 80


def test_words_to_type_are_whole_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    typed = page([])
    for words in helping.EXAMPLES:
        assert f"  {installation.command()} {words}".rstrip() in typed
    for key in schema.keys().values():
        if not key.is_section and key.type is not Stage and not key.name.startswith(("first.", "teacher.")):
            assert key.name in typed or key.default == MISSING


@pytest.mark.parametrize("group", [*schema.groups(), *schema.EXTRAS])
def test_a_group_shows_its_options_and_keys(group):
    said = flat(page([group]))
    for option in options.files(group):
        assert f" {option.stem} {flat(helping.describe(option))}" in said
    for name, key in schema.keys().items():
        if name.startswith(f"{group}.") and not key.is_section and not name.endswith(".name"):
            assert name in said and flat(key.comment) in said


@pytest.mark.parametrize("section", ["first", "teacher"])
def test_a_section_that_a_run_need_not_have_has_a_line_and_a_page_of_its_own(section):
    (line,) = (line for line in page([]).splitlines() if line.startswith(f"  {section}"))
    assert line.startswith(f"  {section}=null ") and f"(its keys: --help {section})" in flat(page([]))
    assert all(key.name in page([section]) for key in helping.below(section))


def test_a_section_that_takes_options_of_a_group_says_its_own_keys():
    said = page(["teacher"])
    assert "teacher.path=<folder>" in said and "model.path" not in said and "* smollm2_135m" not in said


def test_a_stage_shows_what_it_does_and_the_keys_of_its_name():
    said = page(["stage=export"])
    assert said.startswith(f"stage=export: {Stage.export.value}\n\nexport: ") and "export.output=null" in said
    assert page(["stage=doctor"]) == page(["+stage=doctor"])
    assert flat(page(["stage=doctor"])) == f"stage=doctor: {Stage.doctor.value}"


def test_a_stage_that_there_is_not_is_told():
    with pytest.raises(ConfigError, match=r"--help stage=exprot: no such stage \(did you mean export\?\)"):
        page(["stage=exprot"])


def test_the_version_is_that_of_this_program_too(capsys):
    with pytest.raises(SystemExit):
        arguments.parse(["--version"])
    said = capsys.readouterr().out
    assert said.startswith(f"{installation.NAME} {version(installation.NAME)}, Hydra ")


def test_only_the_default_is_marked():
    options = page(["quant"]).partition("\nKeys")[0]
    assert [line.split()[1] for line in options.splitlines() if line.startswith("   * ")] == ["q2a4"]


def test_a_key_says_what_it_takes():
    assert "train.lr=0.001" in page(["train.lr"]) and "(a number, above 0)" in flat(page(["train.lr=3e-4"]))
    assert "quant.mlp.bits=<int>" in page(["quant"]) and "at least 1 and at most 8" in flat(page(["quant.mlp"]))


def test_words_of_a_key_are_explained():
    said = page(["stage"])
    for stage in Stage:
        assert f" {stage.name} {stage.value}" in flat(said)


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
