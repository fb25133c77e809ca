"""Names that differ in files of earlier versions, with their present names. Both are known here alone.

In a checkpoint or a packed export `lut` is a layer's codebook; in a recorded run `table` is the format `codebook`.
"""

from collections.abc import Collection
from typing import Any

PARTS = {"lut": "codebook"}
FORMATS = {"table": "codebook"}


def names(stored: Collection[str]) -> dict[str, str]:
    """What each tensor of a file is called now. An older name beside the one for it stays what it is: a stranger."""
    newer = {name: _newer(name) for name in stored}
    return {name: name if now in stored else now for name, now in newer.items()}


def settings(sections: dict[str, Any]) -> None:
    """Changes the sections of a recorded configuration to what its values are called now."""
    quant = sections.get("quant")
    for format in quant.values() if isinstance(quant, dict) else ():
        if isinstance(format, dict) and isinstance(name := format.get("format"), str):
            format["format"] = FORMATS.get(name, name)


def _newer(name: str) -> str:
    owner, _, part = name.rpartition(".")
    return f"{owner}.{PARTS[part]}" if part in PARTS else name
