"""docs/CONFIG.md is what the schemas and options say today."""

import re

from qat import options
from qat.cli import reference, schema
from qat.config import CONF


def test_the_committed_file_is_the_generated_one():
    written = reference.FILE.read_text(encoding="utf-8")
    assert written == reference.document(), "run `python -m qat.cli.reference`"


def test_every_key_and_option_is_in_it():
    text = reference.document()
    for name, key in schema.keys().items():
        told_elsewhere = name.endswith(".name") or name.startswith(("first.", "teacher."))
        if not (key.is_section or told_elsewhere or reference._is_decided(key)):
            assert f"| `{name}` |" in text
    for group in schema.groups():
        for option in options.files(group):
            assert re.search(rf"^\| (\*\*)?`{re.escape(option.stem)}`(\*\*)? \|", text, re.MULTILINE)


def test_what_an_option_sets_can_be_typed(compose):
    """Also where it is a list of mappings."""
    sets = re.findall(r"`(.+?)`", reference._sets(CONF / "data" / "selfgen.yaml", "data"))
    assert compose("data=mix", "data.name=selfgen", *sets).data == compose("data=selfgen").data


def test_tables_are_even():
    """Every row has as many cells as the header above it, also where a text has a bar in it."""
    width = 0
    for line in reference.document().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (width and cells) or cells == width, line
        width = cells
