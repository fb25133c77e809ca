"""A key says everything about itself where it stands: help, checks and what shapes a result follow from it."""

import copy
import math
from dataclasses import dataclass, fields, replace

import pytest
from hydra.core.config_store import ConfigStore

from qat import config as package
from qat.cli import arguments, checks, completion, compose, helping, main, reference, schema
from qat.cli.checks import values
from qat.config import Config, DataConfig, DataPart, DataSource
from qat.config.keys import Bound, hints, key, like, required, said, section
from qat.errors import ConfigError
from qat.shaping import is_neutral, shaping

SECTIONS = [kind for name in package.__all__ if hasattr(kind := getattr(package, name), "__dataclass_fields__")]
NUMBERS = [
    pytest.param(kind, found, id=f"{kind.__name__}.{found.name}")
    for kind in SECTIONS
    for found in fields(kind)
    if required(hints(kind)[found.name]) in (int, float)
]


@dataclass
class Depth:
    """How far down it goes."""

    metres: int = key(3, "below the sea", low=2, high=9)
    slope: float | None = key(None, "of the ground; null is level", above=0, below=1.5)
    ground: str = key("sand", "what lies there", words=("sand", "rock", "mud"))
    colour: str = key("red", "of the rope", neutral=True)


@dataclass
class Wider(Config):
    """A run with a section that nothing else knows."""

    depth: Depth = section(Depth)


@pytest.fixture(scope="module")
def valid():
    return main.check(arguments.parse([])).configs[0]


@pytest.fixture
def wider(monkeypatch, here):
    """The whole command line over `Wider`."""
    store, caches = ConfigStore.instance(), (schema.keys, schema.groups, schema.nested, schema.register)
    monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))
    for module in (schema, compose):
        monkeypatch.setattr(module, "Config", Wider)
    for found in caches:
        found.cache_clear()
    yield lambda *argv: main.check(arguments.parse(list(argv))).configs[0]
    for found in caches:
        found.cache_clear()


def with_value(kind, name, value):
    """A section with that value and nothing else said."""
    made = kind(**{found.name: None for found in fields(kind)})
    setattr(made, name, value)
    return made


@pytest.mark.parametrize(("kind", "found"), NUMBERS)
def test_every_number_has_a_bound_that_is_enforced_at_its_ends(kind, found):
    bound, whole = said(found).bound, required(hints(kind)[found.name]) is int
    ends = {"at least": bound.low, "above": bound.above, "at most": bound.high, "below": bound.below}
    ends = {word: end for word, end in ends.items() if math.isfinite(end)}
    assert ends, "every number has a bound: what would 0, -1 or a billion mean here?"
    for word, end in ends.items():
        outwards = -math.inf if word in ("at least", "above") else math.inf
        past = end + math.copysign(1, outwards) if whole else math.nextafter(end, outwards)
        inside = end if word.startswith("at ") else math.nextafter(end, -outwards)
        values.check(with_value(kind, found.name, inside))
        for outside in {past, *(() if word.startswith("at ") else (end,))}:
            with pytest.raises(ConfigError) as refused:
                values.check(with_value(kind, found.name, outside))
            told = " and ".join(f"{said_of} {last}" for said_of, last in ends.items())
            assert str(refused.value) == f"{found.name}={outside}: must be {told}"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 2**63])
def test_no_number_is_other_than_finite(valid, number):
    config = replace(valid, train=replace(valid.train, weight_decay=number))
    with pytest.raises(ConfigError, match=r"^train.weight_decay=.*: must be an ordinary finite number$"):
        checks.check(config)


def test_parts_are_bounded_like_the_whole(valid):
    for name in ("documents", "answers", "answer_tokens", "greedy_tokens", "temperature", "thinking"):
        whole, part = (kind.__dataclass_fields__[name] for kind in (DataConfig, DataPart))
        assert said(part) == said(whole) and part.default is None
    parts = [DataPart(DataSource.selfgen), DataPart(DataSource.selfgen, greedy_tokens=-1)]
    with pytest.raises(ConfigError, match=r"^data.parts\[1\].greedy_tokens=-1: must be at least 0$"):
        checks.check(replace(valid, data=replace(valid.data, parts=parts)))


def test_a_new_key_is_told_of_without_another_edit(wider):
    assert "depth.metres=3               below the sea" in helping.page([])
    assert helping.page(["depth"]).startswith("depth: How far down it goes\n")
    assert "depth.slope=null of the ground; null is level (a number, above 0 and below 1.5)" in (
        " ".join(helping.page(["depth"]).split())
    )
    text = reference.document()
    assert "### `depth`" in text
    assert "| `depth.metres` | `3` | a whole number, at least 2 and at most 9 | below the sea |" in text
    assert "| `depth.ground` | `sand` | one of sand, rock, mud | what lies there |" in text
    assert completion.complete("launch.py dep") == ["depth."]
    assert completion.complete("launch.py depth.ground=m") == ["depth.ground=mud"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("depth.metres=1", "depth.metres=1: must be at least 2 and at most 9"),
        ("depth.slope=1.5", "depth.slope=1.5: must be above 0 and below 1.5"),
        ("depth.ground=send", r"depth.ground=send: must be sand, rock or mud \(did you mean sand\?\)"),
        ("depth.metres=deep", "depth.metres=deep: expected a whole number"),
        ("depth.metre=1", r"unknown key depth.metre \(did you mean depth.metres\?\)"),
    ],
)
def test_a_new_key_is_checked_without_another_edit(wider, line, told):
    with pytest.raises(ConfigError, match=f"^{told}$"):
        wider(line)


def test_a_new_key_shapes_results_unless_it_says_otherwise(wider, monkeypatch):
    monkeypatch.setattr("qat.shaping.Config", Wider)
    made = wider("depth.metres=9", "depth.ground=Rock", "depth.colour=blue")
    assert shaping(made)["depth"] == {"metres": 9, "slope": None, "ground": "rock"}
    assert is_neutral("depth.colour") and not is_neutral("depth.metres") and not is_neutral("depth")


def test_a_field_like_another_says_the_same():
    @dataclass
    class Other:
        metres: int | None = like(Depth, "metres")

    assert said(fields(Other)[0]) == said(fields(Depth)[0])
    with pytest.raises(ConfigError, match=r"^metres=1: must be at least 2"):
        values.check(Other(1))
    values.check(Other())


def test_only_numbers_are_bounded_and_only_text_has_words():
    for kind in SECTIONS:
        for found in fields(kind):
            spoken, typed = said(found), required(hints(kind)[found.name])
            assert typed in (int, float) or spoken.bound == Bound()
            assert typed is str or not (spoken.words or spoken.prose)
