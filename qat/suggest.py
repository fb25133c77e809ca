"""The nearest word to a mistyped one."""

import difflib
import shutil
import sys
from collections.abc import Iterable, Mapping

from qat.shown import line, wrapped

SIMILAR = 0.6  # minimum share of letters in common for a word to be suggested
BEGINNING = 3  # minimum letters for the beginning of a word to match it


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None when all are far off.

    A dotted key also answers to its last part: `lr` finds `train.lr`.
    """
    ranked = [(_likeness(word.lower(), name.lower()), name) for name in known]
    likeness, name = max(ranked, default=(0.0, ""))
    return name if likeness >= SIMILAR else None


def named(word: str, described: Mapping[str, str]) -> str | None:
    """The nearest of some described words, or else the one whose description opens with `word`.

    So `train` finds `distill`, which is "train a quantized student".
    """
    opening = (name for name, about in described.items() if about.split()[0] == word.lower())
    return nearest(word, described) or next(opening, None)


def _likeness(word: str, name: str) -> float:
    """Share of letters in common, from 0 to 1."""
    if sorted(word) == sorted(name):  # letters in the wrong order, the commonest slip
        return 1.0
    forms = {name} if "." in word else {name, name.rpartition(".")[2]}
    if len(word) >= BEGINNING and any(form.startswith(word) for form in forms):
        return max(SIMILAR, difflib.SequenceMatcher(None, word, name).ratio())
    return max(difflib.SequenceMatcher(None, word, form).ratio() for form in forms)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean train.lr?)`, or nothing."""
    return hint(nearest(word, known))


def hint(found: str | None) -> str:
    """As `did_you_mean`, for a word that is already found."""
    return f" (did you mean {found}?)" if found else ""


def one_line(error: Exception) -> None:
    """Tells an error on stderr, on one line whatever it says; on a terminal as `wrapped` has it."""
    told = "error: " + line(str(error))
    print(wrapped(told, shutil.get_terminal_size().columns) if sys.stderr.isatty() else told, file=sys.stderr)
