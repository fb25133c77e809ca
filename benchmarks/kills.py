"""Kills commands before every single thing that they do to their files, and looks at what comes of it.

    python -m benchmarks.kills                       # every command, every operation: some 1,100 kills
    python -m benchmarks.kills --only run push       # some commands
    python -m benchmarks.kills --sample 20 --seed 3  # of each command so many operations, drawn with a seed

Each kill is followed by the same command, whose result is compared with that of a command nobody disturbed
(`tests/kills.py` says how). What was tried is kept in `--results`, so that a benchmark which is stopped goes on.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qat.artifacts import write_json

KINDS = ("wrong", "lost", "scratch", "log")
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}


def main() -> int:
    """Tries what is not tried yet, and prints the table; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of commands")
    parser.add_argument("--sample", type=int, help="operations of each command; all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="side by side")
    parser.add_argument("--results", type=Path, default=Path("kills.json"))
    options = parser.parse_args()
    os.environ.update(ALONE)
    from tests.kills import cases

    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    for case in cases():
        if not options.only or case.name in options.only:
            with tempfile.TemporaryDirectory(prefix="kills-") as home:
                os.environ["HOME"] = home
                attempt(case, Path(home), results, options)
    print(table(results))
    return int(any(problems for tried in results.values() for problems in tried["kills"].values()))


def attempt(case: Any, home: Path, results: dict[str, Any], options: argparse.Namespace) -> None:
    """Kills one command at what was not tried yet."""
    from tests.kills import trial, undisturbed

    base, writing = home / "base", threading.Lock()
    case.prepare(base)
    operations, expected = undisturbed(case, base, home / "undisturbed")
    numbers = range(1, len(operations) + 1)
    chosen = random.Random(options.seed).sample(numbers, min(options.sample or len(numbers), len(numbers)))
    kills = results.setdefault(case.name, {}).setdefault("kills", {})
    results[case.name]["operations"] = len(operations)

    def one(number: int) -> None:
        root = home / f"killed-{number}"
        problems = trial(case, base, root, number, expected)
        shutil.rmtree(root, ignore_errors=True)
        with writing:
            kills[str(number)] = problems
            write_json(options.results, results)
        for problem in problems:
            before, found = operations[number - 1].replace(f"{home}/undisturbed", ""), problem.replace(str(root), "")
            print(f"{case.name}, before {number} ({before}): {found}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.processes) as pool:
        for count, _ in enumerate(pool.map(one, [n for n in sorted(chosen) if str(n) not in kills]), start=1):
            if count % 20 == 0:
                print(f"{case.name}: {len(kills)} of {len(chosen)}", file=sys.stderr, flush=True)


def table(results: dict[str, Any]) -> str:
    """A line a command: operations, kills, and how many of them went wrong in which way."""
    header = ("command", "operations", "kills", "wrong results", "lost copies", "scratch left", "wrong in the log")
    lines = [header, ("---", *["---:"] * (len(header) - 1))]
    for name, tried in results.items():
        kills = tried["kills"].values()
        bad = [sum(any(problem.startswith(kind) for problem in problems) for problems in kills) for kind in KINDS]
        lines.append((name, *map(str, (tried["operations"], len(kills), *bad))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
