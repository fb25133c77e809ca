"""`make quick` finds the tests that read what was touched, nearest first, and says what it leaves out."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import quick

FILES = {
    "launch.py": "import qat.main",
    "qat/__init__.py": "",
    "qat/errors.py": "",
    "qat/main.py": "def main():\n    from importlib import import_module as load\n    load(f'qat.stages.{1}')",
    "qat/stages/__init__.py": "",
    "qat/stages/train.py": "from qat import errors",
    "qat/quant/__init__.py": "from qat.quant.grid import x",
    "qat/quant/grid.py": "x = 1",
    "benchmarks/speed.py": "import qat.quant",
    "tests/conftest.py": "from tests import tiny",
    "tests/tiny.py": "",
    "tests/quant/conftest.py": "",
    "tests/quant/test_grid.py": "from qat.quant import grid\ndef test_one(): pass\ndef test_two(): pass",
    "tests/test_errors.py": "NAMED = 'qat.errors'\ndef test_three(): pass",
    "tests/test_far.py": "NAMED = ['launch.py']\ndef test_four(): pass",
    "tests/test_alike.py": "import qat.quant.grid",
    "tests/test_speed.py": "import speed",
    "tests/test_docs.py": "PATH = 'docs'",
    "docs/LOG.md": "",
    "docs/more/x.md": "",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small project under git, all of it on `main`."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(quick, "ROOT", tmp_path)
    monkeypatch.setattr(quick, "FOLDERS", (tmp_path, tmp_path / "benchmarks"))
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "x")
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "all"], ["checkout", "-qb", "mine"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def found(*changed):
    return quick.nearest(quick.steps(quick.reads(list(FILES)), list(changed)), list(changed))


def test_what_is_touched_is_what_differs_from_main(checkout):
    assert quick.touched() == []
    (checkout / "qat" / "new.py").touch()
    (checkout / "qat" / "main.py").write_text("x = 1")
    (checkout / "docs" / "LOG.md").unlink()
    (checkout / "launch.py").write_text("")
    subprocess.run(["git", "commit", "-qm", "mine", "launch.py"], cwd=checkout, check=True)
    assert quick.touched() == ["docs/LOG.md", "launch.py", "qat/main.py", "qat/new.py"]


def test_tests_that_read_a_file_come_nearest_first_and_of_its_room_before_others(checkout):
    assert found("qat/quant/grid.py") == ["tests/quant/test_grid.py", "tests/test_alike.py", "tests/test_speed.py"]
    assert found("qat/errors.py") == ["tests/test_errors.py", "tests/test_far.py"]


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("qat/stages/train.py", ["tests/test_far.py"]),  # by a name that is put together when it runs
        ("docs/more/x.md", ["tests/test_docs.py"]),
        ("tests/quant/conftest.py", ["tests/quant/test_grid.py"]),
        ("tests/test_docs.py", ["tests/test_docs.py"]),
        ("qat/gone.py", []),
    ],
)
def test_other_ways_of_reading_a_file(checkout, changed, tests):
    assert found(changed) == tests


def test_every_test_reads_what_all_conftests_do(checkout):
    assert set(found("tests/tiny.py")) == {name for name in FILES if "/test_" in name}


def test_this_project():
    files = quick.files_there()
    read = quick.reads(files)
    for changed, nearby in {
        "qat/quant/kmeans.py": "tests/quant/test_kmeans.py",
        "qat/stages/evaluate.py": "tests/test_pipeline.py",
        "conf/quant/q2a4.yaml": "tests/cli/test_conf.py",
        "docs/EXTENDING.md": "tests/test_extending.py",
        "launch.py": "tests/test_kill.py",
    }.items():
        assert nearby in quick.nearest(quick.steps(read, [changed]), [changed]), changed
    kmeans = ["qat/quant/kmeans.py"]
    assert quick.nearest(quick.steps(read, kmeans), kmeans)[0].startswith("tests/quant/")


def run(checkout):
    """What `make quick` says there, with one process."""
    shutil.copyfile(quick.__file__, checkout / "tests" / "quick.py")
    place = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-m", "tests.quick", "--numprocesses", "0", "--import-mode=importlib", "-rA"]
    command += ["-o", "pythonpath=. benchmarks"]
    done = subprocess.run(command, cwd=checkout, env=place, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_takes_long_is_left_out_and_told(checkout):
    (checkout / "qat" / "quant" / "grid.py").write_text("x = 2")
    (checkout / "tests" / "test_errors.py").write_text("def test_three(): pass\ndef test_four(): pass")
    (checkout / "qat" / "main.py").write_text("y = 3")
    (checkout / ".pytest_cache" / "v" / "tests").mkdir(parents=True)
    (checkout / ".gitignore").write_text(".pytest_cache")
    taken = {"tests/quant/test_grid.py::test_two": 4.0, "tests/test_errors.py::test_four": 4.0}
    (checkout / ".pytest_cache" / "v" / "tests" / "seconds").write_text(json.dumps(taken))
    (checkout / "tests" / "conftest.py").write_text(
        "from tests import quick\ndef pytest_configure(config): config.pluginmanager.register(quick.Seconds(config))"
    )
    said = run(checkout)
    for name in ("quant/test_grid.py::test_one", "test_errors.py::test_three", "test_errors.py::test_four"):
        assert f"PASSED tests/{name}" in said  # the last is in a file that was touched
    assert "left out, as each took more than 3 s: 1 tests of tests/quant/test_grid.py; make test runs them" in said
    noted = json.loads((checkout / ".pytest_cache" / "v" / "tests" / "seconds").read_text())
    assert noted["tests/quant/test_grid.py::test_two"] == 4.0 and noted["tests/quant/test_grid.py::test_one"] < 4.0


def test_what_no_time_is_left_for_is_left_out_and_told(checkout):
    (checkout / "qat" / "quant" / "grid.py").write_text("x = 2")
    (checkout / "tests" / "conftest.py").write_text("import time\ndef pytest_configure(): time.time = lambda: 4e9")
    said = run(checkout)
    assert "left out, as no time was left: 4 tests of tests/quant/test_grid.py, tests/test_errors.py" in said


def test_pytest_is_given_the_files_that_there_is_time_for():
    files, taken = [f"tests/test_{letter}.py" for letter in "abcd"], dict[str, float]()
    assert quick.fitting(files, [], taken) == files
    taken = {f"{file}::test_{number}": 2.5 for file in files[:2] for number in range(15)}
    taken[f"{files[0]}::test_long"] = 50.0
    assert quick.fitting(files, [], taken) == files[:3]  # 37.5 s, 37.5 s, what a file takes that nobody knows; no more
    assert quick.fitting(files, files[:1], taken) == files[:1]  # all tests of a file that was touched


def test_a_file_that_there_is_no_time_for_is_told_and_not_collected(checkout, monkeypatch, capsys):
    (checkout / "qat" / "quant" / "grid.py").write_text("x = 2")
    monkeypatch.setattr(quick, "UNKNOWN", 79.0)
    given: list[str] = []
    monkeypatch.setattr(quick.pytest, "main", lambda words: given.extend(words) or 0)
    monkeypatch.setattr(quick.os, "environ", {**os.environ})
    assert quick.main(["-x"]) == 0
    assert [word for word in given if word.endswith(".py")] == ["tests/quant/test_grid.py"]
    said = "left out, as no time was left: tests/test_alike.py, tests/test_speed.py; make test runs them"
    assert said in capsys.readouterr().out


def test_where_nothing_differs_nothing_runs(checkout, capsys):
    assert quick.main([]) == 0
    assert capsys.readouterr().out == "nothing differs from main\n"


def test_without_git_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(quick, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"error: git merge-base: .*make test runs all"):
        quick.main([])
