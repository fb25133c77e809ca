"""Documents on disk, split before anything else is done with them."""

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.config import DataConfig, DataSource, Start
from qat.data.documents import Document, obtain_documents, read_documents
from qat.errors import ArtifactError, ConfigError


@pytest.fixture
def text(tmp_path):
    """40 paragraphs, a quarter held apart."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {number} é." for number in range(40)))
    return DataConfig(name="text", source=DataSource.text, path=str(path), eval_fraction=0.25)


@pytest.fixture
def documents(text, tiny, cpu, tmp_path):
    """The artifact of a data configuration, by default `text`."""

    def make(data=text, seed=0):
        return obtain_documents(data, tiny, seed, cpu, tmp_path / "artifacts")

    return make


@given(st.text(), st.floats(0.01, 0.99))
def test_split_is_a_hash_of_the_origin(origin, fraction):
    share = int(hashlib.sha256(origin.encode()).hexdigest()[:16], 16) / 2**64
    assert Document(origin, []).split(fraction) == ("eval" if share < fraction else "train")


@given(st.text(), st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.floats(0.01, 0.99))
def test_documents_of_one_origin_end_on_one_side(origin, one, other, fraction):
    assert Document(origin, one).split(fraction) == Document(origin, other).split(fraction)


@pytest.mark.parametrize("fraction", [0.05, 0.125, 0.5, 0.9])
def test_share_held_apart_is_about_the_fraction(fraction):
    held = sum(Document(f"question {number}", []).split(fraction) == "eval" for number in range(4000))
    assert abs(held / 4000 - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5


@given(st.text(), st.floats(0.01, 0.5), st.floats(0.5, 0.99))
def test_larger_fraction_only_adds_to_what_is_held_apart(origin, small, large):
    if Document(origin, []).split(small) == "eval":
        assert Document(origin, []).split(large) == "eval"


def test_splits_together_are_all_documents_in_order(documents, tiny):
    train, held_out = (list(read_documents(documents(), split)) for split in ("train", "eval"))
    tokenizer = tiny.tokenizer()
    assert {d.origin for d in train}.isdisjoint(d.origin for d in held_out)
    numbers = [[int(d.origin.split()[1]) for d in side] for side in (train, held_out)]
    assert [sorted(side) for side in numbers] == numbers
    assert sorted(numbers[0] + numbers[1]) == list(range(40))
    assert all(tokenizer.decode(d.tokens) == f"{d.origin}<|end|>" for d in train + held_out)


def test_manifest_counts_documents_and_tokens(documents):
    made = documents()
    for split in ("train", "eval"):
        found = list(read_documents(made, split))
        assert made.manifest["documents"][split] == len(found) > 0
        assert made.manifest["tokens"][split] == sum(len(d.tokens) for d in found)


def test_a_person_can_read_the_text(documents):
    rows = [json.loads(line) for line in (documents().folder / "documents.jsonl").read_text("utf-8").splitlines()]
    assert rows[0]["text"] == "Paragraph 0 é.<|end|>"


def test_no_more_documents_than_asked_for(documents, text):
    made = documents(dataclasses.replace(text, documents=20))
    assert sum(made.manifest["documents"].values()) == 20


def test_edited_text_is_another_artifact(documents, text):
    before = documents().key
    with open(text.path, "a") as file:
        file.write("\n\nOne more.")
    assert documents().key != before


def test_seed_shapes_only_text_that_is_sampled(documents, tmp_path):
    assert documents(seed=0).key == documents(seed=1).key
    (tmp_path / "prompts.txt").write_text("\n".join(f"Question {number}?" for number in range(12)))
    path = str(tmp_path / "prompts.txt")
    asked = DataConfig(name="prompts", source=DataSource.selfgen, path=path, answer_tokens=4, eval_fraction=0.4)
    one, same, other = documents(asked, 0), documents(asked, 0), documents(asked, 1)
    assert one.key == same.key != other.key
    assert {d.origin for split in ("train", "eval") for d in read_documents(one, split)} == {
        f"Question {number}?" for number in range(12)
    }


@pytest.mark.parametrize(("fraction", "empty"), [(1e-9, "eval"), (1 - 1e-9, "train")])
def test_empty_split_is_refused_and_leaves_nothing(documents, text, tmp_path, fraction, empty):
    with pytest.raises(ConfigError, match=rf"data=text has no document for the {empty} split \(40 in all\)"):
        documents(dataclasses.replace(text, eval_fraction=fraction))
    assert [path for path in (tmp_path / "artifacts" / "documents").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_refusal_names_a_fraction_that_is_accepted(documents, text, fraction):
    with pytest.raises(ConfigError) as said:
        documents(dataclasses.replace(text, eval_fraction=fraction))
    named = float(str(said.value).partition("data.eval_fraction=")[2])
    assert min(documents(dataclasses.replace(text, eval_fraction=named)).manifest["documents"].values()) >= 1


def test_text_without_blank_lines_is_one_document_and_told_so(documents, text, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"Line {number}." for number in range(40)))
    with pytest.raises(ConfigError, match=r"\(1 in all\): give more text; blank lines separate documents"):
        documents(text)


def test_a_teacher_that_brought_no_question_to_an_end_is_told(documents):
    asked = DataConfig("questions", DataSource.selfgen, start=Start.questions, documents=2, answer_tokens=1)
    with pytest.raises(ConfigError, match=r"\(0 in all\): have the teacher write more"):
        documents(asked)


def test_manifest_counts_what_was_left_out(documents, text, tmp_path):
    assert "read" not in documents().manifest
    with open(tmp_path / "text.txt", "ab") as file:
        file.write(b"\n\ncaf\xe9")
    assert documents().manifest["read"] == [{"rows": 41, "left_out": {"not UTF-8": 1}}]


def test_text_with_too_much_damage_leaves_nothing(documents, text, tmp_path):
    with open(tmp_path / "text.txt", "ab") as file:
        file.write(b"\n\ncaf\xe9" * 6)
    with pytest.raises(ConfigError, match="6 of 46 rows cannot be read"):
        documents()
    assert [path for path in (tmp_path / "artifacts" / "documents").iterdir() if path.suffix != ".lock"] == []


def test_altered_documents_are_refused(documents):
    with open(documents().folder / "documents.jsonl", "r+") as file:
        file.write("x")
    with pytest.raises(ArtifactError, match=r"documents\.jsonl was altered"):
        documents()
