"""Launches of the whole program, and other code, in processes forked from one that has imported everything already.

An interpreter of its own spends seconds on imports before it does anything. What these processes do is otherwise
what `python` does: arguments, environment, directory, exit code, standard streams, functions called at exit.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

IMPORTED = [
    "qat.cli.launch",
    "qat.stages.run",
    "qat.plots",
    "matplotlib.figure",
    "matplotlib.ticker",
    "hydra._internal.hydra",
    "hydra._internal.logging_config",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.run",
    "tests.making",
    "tests.warm",
]
# For an interpreter that has imported all but the project, which it finds where it stands.
WITHOUT_OURS = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("qat", "launch", "tests")]:
    del sys.modules[name]
"""
_OF_A_COPY = """
sys.path.insert(0, {place!r})
{before}
import qat, runpy
from qat import machine, system
from qat.quant import kmeans
assert qat.__file__.startswith({place!r}), qat.__file__
machine.matmul_flops = lambda _: 1e11
kmeans.MAX_EDGES = {edges}
system.tidy = system.trim = lambda: None
sys.argv[0] = {script!r}
while ";" in sys.argv:  # commands before the last, each in a process of its own
    import os, qat.cli.launch, qat.stages.run
    end, child = sys.argv.index(";"), os.fork()
    if not child:
        del sys.argv[end:]
        break
    assert os.waitpid(child, 0)[1] == 0
    del sys.argv[1 : end + 1]
runpy.run_path({script!r}, run_name="__main__")
"""
# Among how many places a codebook's boundaries are sought at most, in tests that are not about that: as many as for
# four entries. Sixteen have 1,280 elsewhere, which take most of the time that a tiny model's conversion does.
EDGES = 320
LAUNCH = str(Path(__file__).resolve().parents[1] / "launch.py")


def processes() -> ForkServerContext:
    """Where such processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class Python:
    """`python` under way, with the words that follow it: `-c` and code, `-m` and a module, or a file."""

    def __init__(
        self,
        *words: str,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Starts it in the current directory, after `before` was called in its process."""
        folder = Path(tempfile.mkdtemp(dir=Path.home()))  # where there is room, even if the current disk has none
        self._streams = [folder / name for name in ("in", "out", "err")]
        self._streams[0].write_text(stdin)
        place = os.getcwd(), dict(os.environ if env is None else env)
        self._process = processes().Process(target=_begin, args=(words, self._streams, *place, before))
        self._process.start()

    def wait_for(self, there: Callable[[], object]) -> None:
        """Returns as soon as something is there."""
        end = time.monotonic() + 60
        while not there():
            assert self._process.is_alive() and time.monotonic() < end, self.ended(0)
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def ended(self, seconds: float = 200) -> tuple[int | None, str, str]:
        """Waits for its end, and brings it about after some time: exit code, standard output and standard error."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        out, err = (path.read_text() if path.exists() else "" for path in self._streams[1:])
        return self._process.exitcode, out, err


class Launch(Python):
    """`python launch.py` under way."""

    def __init__(self, outputs: Path, *words: str, before: Callable[[], None] | None = None) -> None:
        """Starts it, after `before` was called in its process."""
        self.outputs = outputs
        super().__init__(LAUNCH, *words, f"outputs={outputs}", before=before)


def python(*words: str, stdin: str = "", env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """What `python` with these words leaves behind."""
    code, out, err = Python(*words, stdin=stdin, env=env).ended()
    assert code is not None
    return subprocess.CompletedProcess(words, code, out, err)


def of_a_copy(place: Path, script: str, before: str = "pass") -> str:
    """Code that does what `python script` does with the copy of the project in a folder, spared what `lighten` spares.

    Its words may be those of several commands with ";" between them, run one after the other.

    Args:
        place: where `qat` is.
        script: a file.
        before: code that comes first.
    """
    return WITHOUT_OURS + _OF_A_COPY.format(place=str(place), script=script, before=before, edges=EDGES)


def lighten() -> None:
    """Spares this process what takes long and no test of launches looks at: speed, pictures, power cuts, memory."""
    from matplotlib.figure import Figure

    from qat import machine, system
    from qat.quant import kmeans
    from tests import undrawn

    machine.matmul_flops = lambda _: 1e11
    kmeans.MAX_EDGES = EDGES
    system.tidy = system.trim = lambda: None
    os.fsync = lambda descriptor: None
    Figure.savefig = undrawn.savefig


def fork_pythons() -> None:
    """From now on this process forks the interpreters that it would start, and torchrun looks for no names to log."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    dynamic_rendezvous.get_method_name = lambda depth=2: "here"  # else by all modules there are, for seconds
    execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def fork(process: Any, args: Any, executable: Any, *rest: Any) -> None:
        if isinstance(args, str) or os.fspath(args[0]) != sys.executable:
            execute(process, args, executable, *rest)
            return
        _, _, _, cwd, env, _, _, _, given, _, _, out, _, err, _, _, _, _, _, session, *_ = rest
        process.pid = os.fork()
        if not process.pid:
            if session:
                os.setsid()
            _afresh(tuple(word for word in args[1:] if word not in ("-u", "-P")), [given, out, err], cwd, env)
        process._child_created = True
        for end in (given, out, err):
            if end >= 0:
                os.close(end)

    subprocess.Popen._execute_child = fork  # type: ignore[attr-defined]


def _afresh(words: tuple[str, ...], streams: list[int], cwd: str | None, env: Mapping[str, str] | None) -> None:
    """What a forked process does instead of starting an interpreter; does not return."""
    code = 1
    try:
        for number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
        atexit._clear()
        _run(words, streams, cwd or os.getcwd(), dict(os.environ if env is None else env))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    else:
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _begin(
    words: tuple[str, ...], paths: list[Path], cwd: str, env: dict[str, str], before: Callable[[], None] | None
) -> None:
    lighten()
    if before is not None:
        before()
    flags = [os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_APPEND] * 2]
    _run(words, [os.open(path, flag, 0o600) for path, flag in zip(paths, flags, strict=True)], cwd, env)


def _run(words: tuple[str, ...], streams: list[int], cwd: str, env: dict[str, str]) -> None:
    """What `python *words` does, with these streams where they are not -1."""
    for number, stream in enumerate(streams):
        if stream >= 0:
            os.dup2(stream, number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    kind, sys.argv = words[0], [words[0], *words[2 if words[0] == "-m" else 1 :]]
    try:
        if kind == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        elif kind == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
