"""Runs the tests that a change can break, nearest first, in under a minute: `make quick`.

What a test file reads is found without running anything: what it and its conftest.py import, what those import, at the
top or inside a function, and files, modules and folders without Python that they name in a string, as in
`import_module("qat.stages.run")` or `ROOT / "docs"`. The fewer steps from a test file to what was touched, the earlier
it runs; among equals, first those of the same room (`tests/quant/` for `qat/quant/`). pytest is given the nearest
files alone, as many as the time is enough for, by how long their tests took when they last ran. Tests that took long,
and what no time is left for, are left out and told. `make test` runs all.
"""

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT, ROOT / "benchmarks")  # where imports are looked up; see `pythonpath` in pyproject.toml
MAIN = "main"
BEGIN = 40.0  # seconds in which tests may begin
LONG = 3.0  # seconds, of a test that is left out
WORKERS = 2
UNKNOWN = 4.0  # seconds, of a file whose tests have not run yet
UNTIL, TOUCHED = "QUICK_UNTIL", "QUICK_TOUCHED"  # that moment and those files, for pytest's workers
TOOK_LONG, NO_TIME = f"each took more than {LONG:.0f} s", "no time was left"
SHOWN = 8  # files
RECORD = "tests/seconds"  # in pytest's cache: how long each test took when it last ran


def git(*words: str) -> list[str]:
    """The lines that git prints."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: git {words[0]}: {done.stderr.strip() or 'failed'}: make test runs all tests without git")
    return done.stdout.splitlines()


def touched() -> list[str]:
    """Files that are not as `main` has them: committed on a branch, changed, new or gone."""
    (base,) = git("merge-base", MAIN, "HEAD")
    return sorted({*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")})


def files_there() -> list[str]:
    """Every file of the checkout that git knows or would know."""
    return git("ls-files", "--cached", "--others", "--exclude-standard")


def reads(files: list[str]) -> dict[str, set[str]]:
    """What each Python file reads of the others, itself, directly."""
    known = Known(files)
    return {file: set(known.read_by(file)) for file in files if file.endswith(".py") and (ROOT / file).is_file()}


class Known:
    """The files of a checkout, found by path, by module, and by the name of a folder without Python."""

    def __init__(self, files: list[str]) -> None:
        self.files = set(files)
        self.modules = {module_of(file): file for file in files if file.endswith(".py")}
        code = {Path(file).parts[0] for file in files if file.endswith(".py")}
        self.folders: dict[str, list[str]] = {}
        for file in files:
            if (top := Path(file).parts[0]) not in code:
                self.folders.setdefault(top, []).append(file)

    def read_by(self, file: str) -> Iterator[str]:
        """Files that a file names in imports and strings, and the conftest.py of every folder that a test is in."""
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self.imported(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    yield from self.imported(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                yield from self.below(str(node.values[0].value))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from self.named(node.value)
        if file.startswith("tests/"):
            yield from (f for above in Path(file).parents if (f := f"{above}/conftest.py") in self.files)

    def imported(self, name: str) -> Iterator[str]:
        """The modules that an import of a dotted name runs: it, and the packages that it is in."""
        parts = name.split(".")
        names = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        yield from (self.modules[name] for name in names & self.modules.keys())

    def below(self, prefix: str) -> Iterator[str]:
        """Modules whose names begin with `qat.stages.` and the like, of which one is chosen when it runs."""
        if prefix.endswith(".") and prefix[:-1] in self.modules:
            yield from (file for name, file in self.modules.items() if name.startswith(prefix))

    def named(self, text: str) -> Iterator[str]:
        """What a string names: a file by its path, a module with a dot in it, all of a folder without Python."""
        if text in self.files:
            yield text
        elif "." in text and text in self.modules:
            yield from self.imported(text)
        yield from self.folders.get(text, ())


def module_of(file: str) -> str:
    """The name by which a file is imported."""
    path = ROOT / file
    top = max((folder for folder in FOLDERS if path.is_relative_to(folder)), key=lambda folder: len(folder.parts))
    dotted = ".".join(path.relative_to(top).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def steps(read: dict[str, set[str]], starts: list[str]) -> dict[str, int]:
    """How far every file is from the nearest of some that it reads, itself or through others; others are absent."""
    readers: dict[str, set[str]] = {}
    for reader, sources in read.items():
        for source in sources:
            readers.setdefault(source, set()).add(reader)
    found, edge, step = dict.fromkeys(starts, 0), set(starts), 0
    while edge:
        step += 1
        edge = {reader for file in edge for reader in readers.get(file, ())} - found.keys()
        found |= dict.fromkeys(edge, step)
    return found


def nearest(far: dict[str, int], changed: list[str]) -> list[str]:
    """Test files that read what was touched, nearest first."""
    rooms = {Path(file).parts[1].removesuffix(".py").removeprefix("test_") for file in changed if "/" in file}

    def rank(file: str) -> tuple[int, bool, str]:
        parts = Path(file).parts
        room = parts[1] if len(parts) > 2 else parts[1].removesuffix(".py").removeprefix("test_")
        return far[file], room not in rooms, file

    tests = [file for file in far if file.startswith("tests/") and Path(file).name.startswith("test_")]
    return sorted((file for file in tests if (ROOT / file).is_file()), key=rank)


def fitting(files: list[str], changed: list[str], taken: dict[str, float]) -> list[str]:
    """The first of these test files, as many as there is time for: at least one."""
    known: dict[str, float] = {}
    for name, seconds in taken.items():
        file = name.partition("::")[0]
        known[file] = known.get(file, 0.0) + (seconds if seconds <= LONG or file in changed else 0.0)
    ends = accumulate(known.get(file, UNKNOWN) for file in files)
    return [file for file, end in zip(files, ends, strict=True) if end <= WORKERS * BEGIN] or files[:1]


def main(argv: list[str]) -> int:
    """Finds the tests and runs them with pytest, which takes `argv`; returns the exit code."""
    until, changed = time.time() + BEGIN, touched()
    tests = nearest(steps(reads(files_there()), changed), changed)
    if not tests:
        print(f"nothing that a test reads differs from {MAIN}" if changed else f"nothing differs from {MAIN}")
        return 0
    print(f"{len(changed)} files differ from {MAIN}, {len(tests)} test files read them", flush=True)
    chosen = fitting(tests, changed, noted())
    if left := tests[len(chosen) :]:
        print(f"left out, as {NO_TIME}: {shown(left)}; make test runs them", flush=True)
    os.environ |= {UNTIL: str(until), TOUCHED: json.dumps(changed)}
    order = ["--numprocesses", str(WORKERS), "--dist", "loadfile", "--no-loadscope-reorder"]
    return int(pytest.main(["-p", "tests.quick", *order, *argv, *chosen]))


def shown(files: list[str]) -> str:
    """The first of some files, and how many others there are."""
    more = f" and {len(files) - SHOWN} more files" if len(files) > SHOWN else ""
    return ", ".join(files[:SHOWN]) + more


LENGTHY = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Looks up which tests took long, but for those in files that were touched themselves."""
    changed, taken = json.loads(os.environ[TOUCHED]), recorded(config)
    config.stash[LENGTHY] = {
        name for name, seconds in taken.items() if seconds > LONG and name.partition("::")[0] not in changed
    }


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves a test out that took long, or for which no time is left."""
    if item.nodeid in item.config.stash[LENGTHY]:
        pytest.skip(TOOK_LONG)
    if time.time() > float(os.environ[UNTIL]):
        pytest.skip(NO_TIME)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was left out."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)]
    for reason in (TOOK_LONG, NO_TIME):
        left = [report.nodeid for report in skipped if report.longrepr[2].endswith(reason)]
        files = list(dict.fromkeys(name.partition("::")[0] for name in left))
        if left:
            said = f"left out, as {reason}: {len(left)} tests of {shown(files)}; make test runs them"
            terminalreporter.write_line(said)


def recorded(config: pytest.Config) -> dict[str, float]:
    """How many seconds each test took when it last ran here; nothing where pytest keeps no cache."""
    cache = getattr(config, "cache", None)
    taken: dict[str, float] = cache.get(RECORD, {}) if cache else {}
    return taken


def noted() -> dict[str, float]:
    """The same before pytest runs."""
    file = ROOT / ".pytest_cache" / "v" / RECORD
    taken: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return taken


class Seconds:
    """Records how long tests take, in any run of pytest."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.taken = config, dict[str, float]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a test that went through, without its fixtures, which others may share."""
        if report.when == "call" and report.passed:
            self.taken[report.nodeid] = round(report.duration, 2)

    def pytest_sessionfinish(self) -> None:
        """Writes it down, beside what is known of others."""
        cache = getattr(self.config, "cache", None)
        if cache and not hasattr(self.config, "workerinput"):
            cache.set(RECORD, recorded(self.config) | self.taken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
