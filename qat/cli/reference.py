"""`docs/CONFIG.md`, written from `qat/config/` and `conf/`: `python -m qat.cli.reference`.

A test compares the file with what is written here, so it cannot fall behind.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from qat import options
from qat.artifacts import write_text
from qat.cli import helping, schema
from qat.cli.schema import Key
from qat.config import CONF, DataPart, Stage

FILE = Path(__file__).resolve().parents[2] / "docs" / "CONFIG.md"

INTRO = """\
# Configuration

Written by `python -m qat.cli.reference` from the schemas in `qat/config/` and the options in `conf/`; change those.
`qat --help`, in a clone `python launch.py --help`, says the same in a terminal, `--help quant train.lr` a part of it.

Options are chosen (`quant=q2a4`), keys are set (`train.lr=3e-4`), and with `-m` either takes several values
(`-m quant=q2a4,q4a4`). An own option is a file in a folder of the same shape: `--config-dir mine quant=other` reads
`mine/quant/other.yaml`. `conf/` in the current folder and folders that `QAT_CONF` names are read without being said."""


def document() -> str:
    """The whole file."""
    stages = _table(("stage", "does"), ((f"`{stage.name}`", stage.value) for stage in Stage))
    plain = [key for key in schema.keys().values() if "." not in key.name and not key.is_section]
    sections = [key.name for key in schema.keys().values() if "." not in key.name and key.is_section]
    own = [name for name in sections if name not in schema.groups()]
    parts = [INTRO, "## Stages", "`stage=<stage>`", stages, "## Keys of their own", _keys(plain), "## Groups"]
    for group in schema.groups():
        parts += _section(group)
    parts += ["## Presets", *(part for group in schema.EXTRAS for part in _presets(group)), "## Sections"]
    for section in own:
        parts += _section(section)
    return "\n\n".join(parts) + "\n"


def _section(name: str) -> Iterator[str]:
    """A group with its options and keys, or a section with its keys."""
    yield f"### `{name}`"
    yield f"{helping.summary(name)}."
    if name in schema.groups():
        yield _options(name)
    if name == "first":  # the same keys again
        yield (
            "`first.quant=<option> first.mode=<option>` make one; its keys are those of `quant`, `mode`, `train`:"
            " `first.train.steps=200`."
        )
        return
    if name in schema.nested():
        group = schema.nested()[name]
        yield f"`{name}=<option>` takes the options of `{group}` and has its keys: `{name}=local {name}.path=<folder>`."
        return
    keys = helping.below(name)
    if any(not _is_decided(key) for key in keys):
        yield _keys(keys)
    if name == "data":
        yield f"A part in `data.parts` has the keys {', '.join(f'`{part}`' for part in DataPart.__dataclass_fields__)}."


def _presets(group: str) -> Iterator[str]:
    yield f"### `{group}`"
    rows = ((f"`{group}={option.stem}`", helping.describe(option)) for option in _files(group))
    yield _table(("preset", "is"), rows)


def _options(group: str) -> str:
    default = options.defaults()[group]
    rows = []
    for option in _files(group):
        name = f"**`{option.stem}`**" if option.stem == default else f"`{option.stem}`"
        rows.append((name, helping.describe(option), _sets(option, group)))
    return _table(("option (default bold)", "is", "sets"), rows)


def _files(group: str) -> list[Path]:
    """The package's own options of a group."""
    return sorted((CONF / group).glob("*.yaml"))


def _sets(option: Path, group: str) -> str:
    """What an option sets beyond its name, as one would type it."""
    values = yaml.safe_load(option.read_text(encoding="utf-8"))
    return " ".join(f"`{key}={schema.written(value)}`" for key, value in _flat(values, group) if value is not None)


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}.{name}")
        elif name != "name":
            yield f"{prefix}.{name}", value


def _keys(keys: Iterable[Key]) -> str:
    rows = ((f"`{key.name}`", _default(key), key.takes(), _words(key)) for key in keys if not _is_decided(key))
    return _table(("key", "default", "takes", "is"), rows)


def _is_decided(key: Key) -> bool:
    """True for what an option is: its source, format or backend, which nobody sets by hand."""
    return key.default == MISSING and bool(key.words())


def _default(key: Key) -> str:
    return "by the option" if key.default == MISSING else f"`{schema.written(key.default) or chr(39) * 2}`"


def _words(key: Key) -> str:
    """A key's comment, and what each of its words means."""
    words = key.words()
    if key.type is Stage or not any(words.values()):
        return key.comment
    return f"{key.comment}: " + "; ".join(f"`{word}`, {meaning}" for word, meaning in words.items())


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Text as a table of Markdown shows it: `<folder>` is no tag."""
    return text if text.startswith("`") else text.replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    write_text(FILE, document())
