"""The package's own tasks: every row has one right answer that its program can tell."""

import json
from importlib.resources import files

import pytest

from qat.evaluate import local
from qat.evaluate.local.judge import CHECKS, follows


def rows(name):
    text = (files("qat.evaluate.local") / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["cloze", "choice"])
def test_every_question_has_four_different_answers_and_no_place_is_favoured(name):
    found = rows(name)
    assert len({row["text"] for row in found}) == len(found) >= 30
    assert all(len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4 for row in found)
    assert max([row["answer"] for row in found].count(place) for place in range(4)) <= len(found) / 2


def test_every_instruction_has_checks_that_an_empty_answer_fails():
    found = rows("instructions")
    assert len({row["text"] for row in found}) == len(found) >= 30
    assert {check["check"] for row in found for check in row["checks"]} <= set(CHECKS)
    assert not any(follows({"row": json.dumps(row)}, [" "])["acc"] for row in found)


@pytest.mark.parametrize(
    ("check", "value", "right", "wrong"),
    [
        ("contains", ["one", "two"], "Two and ONE.", "one"),
        ("any", ["small", "tiny"], "Tiny", "big"),
        ("without", ["water"], "A wide blue plain", "Salt water"),
        ("equals", "12", "12.", "It is 12"),
        ("starts", "yes", "Yes, it is.", "It is, yes"),
        ("ends", "goodbye", "A hat is worn. Goodbye!", "Goodbye, hat"),
        ("words", 3, "one two three", "one two three four"),
        ("lines", 2, "a\n\nb\n", "a b"),
        ("each", "-", "- a\n- b", "- a\nb"),
        ("sentences", 2, "It is 3.5 m. Good!", "One."),
        ("lower", None, "grass.", "Grass."),
        ("upper", None, "FISH!", "Fish"),
        ("json", ["a"], '```json\n{"a": 1}\n```', '{"a": 1, "b": 2}'),
        ("json", ["a"], '{"a": 1}', "[1]"),
    ],
)
def test_a_program_tells_right_from_wrong(check, value, right, wrong):
    row = {"row": json.dumps({"checks": [{"check": check, "value": value}]})}
    assert [follows(row, [said])["acc"] for said in (right, wrong)] == [1.0, 0.0]


def test_names_stand_for_files_that_are_there():
    assert [local.files_of(name) for name in local.NAMES] == [[file] for file in local.files_of("local")]
    assert local.files_of("arc_easy") == ["arc_easy"]


def test_answers_to_weigh_are_those_of_the_rows_that_are_asked():
    assert local.choices(["local"]) == sum(len(row["choices"]) for name in ("cloze", "choice") for row in rows(name))
    assert local.choices(["local_cloze", "local_cloze"], 3) == 12 and local.choices(["local_instructions"]) == 0
    assert local.choices(["local_cloze", "winogrande"]) is None
