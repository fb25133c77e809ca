r"""`${…}` in text that Hydra reads: plain text after a backslash, otherwise a reference to the value that it names.

A recorded run and the plan of a sweep hold values alone. A reference in one of them was put there by somebody else,
and could fetch what is none of his business (`${oc.env:…}`) or run what he likes.
"""

import re

# After an odd number of backslashes `${` is plain text. Before `${` two backslashes stand for one; elsewhere a
# backslash stands for itself.
_REFERENCE = re.compile(r"(\\*)\$\{")


def escaped(text: str) -> str:
    """Text in which Hydra sees no reference."""
    return _REFERENCE.sub(r"\1\1\\${", text)


def unescaped(text: str) -> str:
    """The original of a text from `escaped`."""
    return _REFERENCE.sub(lambda found: "\\" * (len(found[1]) // 2) + "${", text)


def is_live(text: str) -> bool:
    """True where Hydra would see a reference."""
    return any(len(found[1]) % 2 == 0 for found in _REFERENCE.finditer(text))
