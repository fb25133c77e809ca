"""Several sources in the proportions of their weights."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.config import DataConfig, DataPart, DataSource
from qat.data.documents import obtain_documents, read_documents
from qat.data.mix import interleave, parts


def stream(name, lengths):
    return ((f"{name} {number}", [0] * length) for number, length in enumerate(lengths))


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.floats(0.1, 10)), min_size=1, max_size=4
    )
)
def test_tokens_stand_in_the_proportion_of_the_weights(sources):
    streams = [stream(number, lengths) for number, (lengths, _) in enumerate(sources)]
    taken = [0.0] * len(sources)
    for origin, tokens in interleave(streams, [weight for _, weight in sources]):
        number = int(origin.split()[0])
        taken[number] += len(tokens)
        shares = [amount / weight for amount, (_, weight) in zip(taken, sources, strict=True)]
        assert max(shares) - min(shares) <= max(50 / weight for _, weight in sources)


def test_every_document_comes_in_order_until_the_first_source_ends():
    found = [origin for origin, _ in interleave([stream("a", [5] * 3), stream("b", [5] * 100)], [1, 2])]
    assert [o for o in found if o[0] == "a"] == ["a 0", "a 1", "a 2"]
    assert [o for o in found if o[0] == "b"] == [f"b {number}" for number in range(6)]


def test_parts_say_only_what_differs():
    data = DataConfig(name="mix", source=DataSource.mix, thinking="both", temperature=0.5, eval_fraction=0.2)
    data.parts = [
        DataPart(source=DataSource.text, path="a", thinking="true"),
        DataPart(source=DataSource.selfgen, documents=3),
        DataPart(source=DataSource.selfgen, answers=4, answer_tokens=128, greedy_tokens=0, temperature=1.5),
    ]
    one, two, three = parts(data)
    assert (three.answers, three.answer_tokens, three.greedy_tokens, three.temperature) == (4, 128, 0, 1.5)
    assert (two.answers, two.answer_tokens, two.greedy_tokens) == (1, 80, 4)
    assert (one.source, one.path, one.thinking, one.documents) == (DataSource.text, "a", "true", None)
    assert (two.source, two.path, two.thinking, two.documents) == (DataSource.selfgen, None, "both", 3)
    assert {part.temperature for part in (one, two)} == {0.5} and parts(one) == [one]


@pytest.fixture
def mixture(tmp_path):
    """20 short texts, conversations of ten times their length, and two prompts."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"Text {number:02d}" for number in range(20)))
    rows = [{"instruction": f"Do {number:02d}", "output": "x" * 60} for number in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "prompts.txt").write_text("\n".join(f"Why {number}?" for number in range(40)))
    kinds = {"text": "text.txt", "alpaca": "rows.json", "selfgen": "prompts.txt"}
    made = [DataPart(source=DataSource[kind], path=str(tmp_path / name)) for kind, name in kinds.items()]
    return DataConfig(name="mix", source=DataSource.mix, parts=made, answer_tokens=4, eval_fraction=0.3)


def test_a_mixture_is_documents_like_any_other(mixture, tiny, cpu, tmp_path):
    made = obtain_documents(mixture, tiny, 0, cpu, tmp_path / "artifacts")
    found = [document for split in ("train", "eval") for document in read_documents(made, split)]
    tokens = {kind: sum(len(d.tokens) for d in found if d.origin.startswith(kind)) for kind in ("Text", "Do", "Why")}
    assert max(tokens.values()) - min(tokens.values()) <= 80 and min(tokens.values()) > 60
    assert [path.name for path in made.folder.iterdir() if path.name.startswith(".")] == []


def test_weights_and_contents_are_part_of_the_key_and_paths_are_not(mixture, tiny, cpu, tmp_path):
    def key(changed=mixture):
        return obtain_documents(changed, tiny, 0, cpu, tmp_path / "artifacts").key

    before = key()
    heavier = [dataclasses.replace(mixture.parts[0], weight=3.0), *mixture.parts[1:]]
    moved = tmp_path / "moved.txt"
    moved.write_text((tmp_path / "text.txt").read_text())
    elsewhere = [dataclasses.replace(mixture.parts[0], path=str(moved)), *mixture.parts[1:]]
    assert key(dataclasses.replace(mixture, parts=heavier)) != before
    assert key(dataclasses.replace(mixture, parts=elsewhere)) == before
    with open(tmp_path / "rows.json", "a") as file:
        file.write(" ")
    assert key() != before
