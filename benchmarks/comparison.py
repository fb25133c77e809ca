"""A comparison as a command: words of its command line, and doing what is missing of it."""

import argparse
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import evaluation
from results import Results

from qat.errors import ConfigError, QatError, UnavailableError

Job = tuple[str, Callable[[Results], None]]  # what readers call it, and what adds its rows where they are missing


def compare(options: argparse.Namespace, jobs: Iterable[Job]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Takes in the rows of `--merge` and does every job; a mistake ends the program with its sentence.

    Args:
        options: with what `add_arguments` adds.
        jobs: may be made as they are asked for; one that cannot run here is passed over.

    Returns:
        All rows of `--json`, and by their names why jobs were passed over.
    """
    logging.basicConfig(level=logging.WARNING)
    results, skipped = Results(Path(options.json)), {}
    try:
        for path in options.merge:
            results.merge(Results(Path(path)))
        for name, job in jobs:
            try:
                job(results)
            except UnavailableError as error:
                skipped[name] = str(error)
        return results.rows, skipped
    except QatError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def by_name(words: list[str]) -> dict[str, list[Path]]:
    """Paths by the name that each word of `--trained` gives, as `name=path`.

    Raises:
        ConfigError: a word is not of this form.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            raise ConfigError(f"--trained {word} is not name=path")
        found[name].append(Path(path))
    return found


def add_arguments(parser: argparse.ArgumentParser, kept: str) -> None:
    """What every comparison has; its rows are in `kept` unless `--json` says otherwise."""
    evaluation.add_arguments(parser)
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="that methods may look at")
    parser.add_argument("--convert", default="fast", help="an option of conf/convert")
    parser.add_argument(
        "--trained", "--checkpoint", nargs="+", default=[], metavar="NAME=PATH", help="runs or checkpoints of ours"
    )
    parser.add_argument("--outputs", default="outputs", help="where what is made is kept")
    parser.add_argument("--json", default=kept, help="where rows are kept")
    parser.add_argument("--merge", nargs="+", default=[], metavar="JSON", help="files whose rows go there as well")
