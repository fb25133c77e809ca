r"""`${…}` in text that Hydra reads: with a backslash before it text, else a reference to whatever it names.

A recorded run and the plan of a sweep hold values alone. A reference in one of them was put there by somebody else,
and could fetch what is none of his business (`${oc.env:…}`) or run what he likes.
"""

import re

# An odd number of backslashes makes text of it; two are one before it, and elsewhere a backslash is itself.
_REFERENCE = re.compile(r"(\\*)\$\{")


def escaped(text: str) -> str:
    """Text in which Hydra sees no reference."""
    return _REFERENCE.sub(r"\1\1\\${", text)


def unescaped(text: str) -> str:
    """Such text as it was."""
    return _REFERENCE.sub(lambda found: "\\" * (len(found[1]) // 2) + "${", text)


def is_live(text: str) -> bool:
    """True where Hydra would see a reference."""
    return any(len(found[1]) % 2 == 0 for found in _REFERENCE.finditer(text))
