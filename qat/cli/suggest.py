"""The nearest word to a mistyped one."""

import difflib
import sys
from collections.abc import Iterable

SIMILAR = 0.6  # share of letters in common, from which a suggestion helps more than it distracts


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, or None when all are far off.

    A dotted key also answers to its last part: `lr` finds `train.lr`.
    """
    ranked = [(_likeness(word.lower(), name.lower()), name) for name in known]
    likeness, name = max(ranked, default=(0.0, ""))
    return name if likeness >= SIMILAR else None


def _likeness(word: str, name: str) -> float:
    """Share of letters in common, from 0 to 1."""
    if sorted(word) == sorted(name):  # letters in the wrong order, the commonest slip
        return 1.0
    forms = {name} if "." in word else {name, name.rpartition(".")[2]}
    return max(difflib.SequenceMatcher(None, word, form).ratio() for form in forms)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean train.lr?)`, or nothing."""
    found = nearest(word, known)
    return f" (did you mean {found}?)" if found else ""


def one_line(error: Exception) -> None:
    """Tells an error on stderr, on one line whatever it says."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
