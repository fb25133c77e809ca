"""Text that already exists: which documents it becomes, and the sentence where it cannot be read."""

import hashlib
import json
import re

import pytest

from qat.config import DataConfig, DataSource
from qat.data import files, passages
from qat.data.sources import render
from qat.data.tally import Tally
from qat.data.texts import content_hash, look, prompts
from qat.data.thinking import chat_tokens
from qat.errors import ConfigError, MissingError


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.tokenizer()


@pytest.fixture
def source(tmp_path):
    """A data configuration whose file holds the given text, or the given rows as JSON lines."""

    def make(kind, content, name="data.json", **settings):
        if not isinstance(content, str):
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return DataConfig(name=kind, source=DataSource[kind], path=str(path), **settings)

    return make


@pytest.fixture
def rendered(tokenizer):
    """Origin and decoded text of every document, once nothing is against the source."""

    def make(data):
        tally = Tally.of(data)
        found = [(origin, tokenizer.decode(tokens)) for origin, tokens in render(data, tokenizer, tally)]
        tally.settle()
        return found

    return make


def test_alpaca_row_is_a_question_and_its_answer(source, rendered):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Wave.", "output": "~"},
    ]
    assert rendered(source("alpaca", json.dumps(rows))) == [
        ("Add.\n\n1 and 2", "<|user|>Add.\n\n1 and 2<|end|><|assistant|>3<|end|>"),
        ("Say hi.", "<|user|>Say hi.<|end|><|assistant|>hi<|end|>"),
        ("Wave.", "<|user|>Wave.<|end|><|assistant|>~<|end|>"),
    ]


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("alpaca", "no json", "holds no rows: data=text reads plain text"),
        ("alpaca", '[{"instruction": "a"}]', "data=prompts lets the teacher answer"),
        ("alpaca", '[{"output": "a"}]', "no conversation, and no question with an answer"),
        ("alpaca", '{"rows": []}', "there is no text in it"),
        ("alpaca", '["text"]', "not a JSON object: 1, data.json row 1 (line 1)"),
        ("alpaca", "3", "holds no rows"),
        ("chat_jsonl", '{"messages": []}\n', "no turns: 1, data.json line 1"),
        ("chat_jsonl", '{"text": "a"}\n', "data=text reads texts"),
        ("text", '{"messages": [{"role": "user", "content": "q"}]}\n', "data=chat_jsonl reads conversations"),
    ],
)
def test_files_of_another_kind_are_refused_before_any_work_and_while_reading(source, rendered, kind, text, said):
    data = source(kind, text)
    for refuse in (look, rendered):
        with pytest.raises(ConfigError, match=re.escape(data.path) + ".*" + re.escape(said)):
            refuse(data)


def test_a_look_ends_at_the_first_row_of_use(source):
    good = '{"instruction": "q", "output": "a"}\n'
    data = source("chat_jsonl", "broken\n" * 20 + good + "broken\n" * 5000, "a.jsonl")
    look(data)
    with open(data.path, "a") as file:
        file.truncate(100)
    with pytest.raises(ConfigError, match=r"15 of 15 rows cannot be read"):
        look(data)


def test_messages_and_sharegpt_are_the_same_conversation(source, rendered):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    data = source("chat_jsonl", [{"messages": messages}, {"conversations": sharegpt, "id": 7}])
    assert rendered(data) == [("hi", "<|user|>hi<|end|><|assistant|>ho<|end|>")] * 2


def test_origin_of_a_conversation_is_its_first_question(source, rendered):
    system = {"role": "system", "content": "Be kind."}
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "a"}]
    more = [*turns, {"role": "user", "content": "second"}, {"role": "assistant", "content": "b"}]
    found = rendered(source("chat_jsonl", [{"messages": [system, *more]}, {"messages": turns}]))
    assert [origin for origin, _ in found] == ["first", "first"]
    assert found[0][1].startswith("<|system|>Be kind.<|end|><|user|>first")


def test_conversation_without_a_question_has_its_first_turn_as_origin(source, rendered):
    data = source("chat_jsonl", [{"messages": [{"role": "assistant", "content": "alone"}]}])
    assert rendered(data) == [("alone", "<|assistant|>alone<|end|>")]


def test_empty_turn_stays_empty(source, rendered):
    data = source("chat_jsonl", [{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "q"}]}])
    assert rendered(data) == [("q", "<|system|><|end|><|user|>q<|end|>")]


def test_unusual_line_separators_stay_inside_their_turn(source, rendered):
    text = "one\u2028two\x85three\x0cfour"
    data = source("chat_jsonl", [{"messages": [{"role": "user", "content": text}]}])
    assert rendered(data) == [(text, f"<|user|>{text}<|end|>")]


def test_blank_lines_between_json_lines_are_skipped(source, rendered):
    row = json.dumps({"messages": [{"role": "user", "content": "q"}]})
    assert len(rendered(source("chat_jsonl", f"\n{row}\n\n{row}\n"))) == 2


def test_a_few_bad_rows_are_left_out_and_told(source, rendered, caplog):
    good = [{"messages": [{"role": "user", "content": f"q {n}"}]} for n in range(9)]
    lines = [json.dumps(row) for row in good]
    data = source("chat_jsonl", "\n".join([*lines[:3], '{"messages": [', *lines[3:], '{"id": 7}']), "a.jsonl")
    assert [origin for origin, _ in rendered(data)] == [f"q {n}" for n in range(9)]
    (told,) = caplog.messages
    assert told.startswith(f"data.path={data.path}: left out 2 of 11 rows (not JSON: 1, a.jsonl line 4")


def test_marks_in_the_text_are_text_and_told(source, rendered, tokenizer, caplog):
    caplog.set_level("INFO")
    said = "what is <|end|><|assistant|>?"
    data = source("chat_jsonl", [{"instruction": said, "output": "a mark"}, {"instruction": "q", "output": "a"}])
    assert rendered(data)[0] == (said, f"<|user|>{said}<|end|><|assistant|>a mark<|end|>")
    assert "1 of 2 rows have marks of the chat template in their text" in caplog.messages[0]
    text = source("text", "A page with <|end|> inside.\n", "a.txt")
    ((origin, tokens),) = render(text, tokenizer, Tally.of(text))
    assert origin == "A page with <|end|> inside." and tokenizer.decode(tokens) == f"{origin}<|end|>"
    assert tokens.index(tokenizer.eos_token_id) == len(tokens) - 1


def test_a_long_conversation_is_several_documents_on_one_side(source, rendered):
    answer = "word " * 30_000
    found = rendered(source("chat_jsonl", [{"instruction": "go", "output": answer}]))
    assert [origin for origin, _ in found] == ["go"] * 3
    assert "".join(text for _, text in found) == f"<|user|>go<|end|><|assistant|>{answer}<|end|>"


def test_a_long_paragraph_is_several_documents_of_which_the_last_ends(source, rendered, monkeypatch):
    monkeypatch.setattr(passages, "PASSAGE", 100_000)
    text = " ".join(f"word{n}" for n in range(40_000))
    found = rendered(source("text", f"{text}\n\nAnother.", "a.txt"))
    assert "".join(text for _, text in found).replace(" ", "") == f"{text}<|end|>Another.<|end|>".replace(" ", "")
    assert all(text.startswith(origin) for origin, text in found) and len(found) > 5


def test_paragraphs_of_a_text_file_are_documents_with_an_end(source, tokenizer):
    data = source("text", "One\nline.\n\n\n  Two.  \n \nThree.\n", "data.txt")
    found = list(render(data, tokenizer, Tally.of(data)))
    assert [origin for origin, _ in found] == ["One\nline.", "Two.", "Three."]
    assert [tokenizer.decode(tokens) for _, tokens in found] == ["One\nline.<|end|>", "Two.<|end|>", "Three.<|end|>"]


def test_text_of_json_lines_are_documents(source, rendered):
    data = source("text", [{"text": "One\n\nstill one."}, {"text": ""}, {"title": "x"}, {"text": "Two."}], "data.jsonl")
    assert rendered(data) == [("One\n\nstill one.", "One\n\nstill one.<|end|>"), ("Two.", "Two.<|end|>")]


def test_long_paragraph_is_known_by_its_beginning(source, rendered):
    ((origin, text),) = rendered(source("text", "x" * 300, "data.txt"))
    assert (origin, text) == ("x" * 200, "x" * 300 + "<|end|>")


def test_question_is_rendered_up_to_where_the_answer_begins(tokenizer):
    ask = chat_tokens(tokenizer, [{"role": "user", "content": "q"}], ask=True)
    assert tokenizer.decode(ask) == "<|user|>q<|end|><|assistant|>"


@pytest.mark.parametrize(("thinking", "seen"), [("true", "on"), ("false", "off")])
def test_thinking_is_the_chat_templates_own_switch(tiny, thinking, seen):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% if enable_thinking %}on{% else %}off{% endif %}"
    assert tokenizer.decode(chat_tokens(tokenizer, [{"role": "user", "content": "q"}], thinking)) == seen


def test_prompts_of_a_file_skip_comments_and_blank_lines(source):
    assert prompts(source("selfgen", "# why\nOne?\n\n  Two?  \n", "mine.txt")) == ["One?", "Two?"]


def test_prompt_file_without_a_prompt_is_refused(source):
    data = source("selfgen", "# only comments\n\n", "mine.txt")
    with pytest.raises(ConfigError, match=re.escape(f"data.path={data.path}: there is no text in it")):
        prompts(data)


def test_hash_is_that_of_the_text(source):
    assert content_hash(source("text", "some text", "a.txt")) == hashlib.sha256(b"some text").hexdigest()


@pytest.mark.parametrize("kind", ["text", "alpaca", "chat_jsonl"])
def test_source_without_a_file_asks_for_one(kind):
    with pytest.raises(ConfigError, match=f"data={kind} needs data.path=<file> or data.repo="):
        content_hash(DataConfig(name=kind, source=DataSource[kind]))


def test_missing_file_is_named(tmp_path):
    data = DataConfig(name="text", source=DataSource.text, path=str(tmp_path / "nowhere.txt"))
    with pytest.raises(ConfigError, match=re.escape(f"data.path={tmp_path / 'nowhere.txt'}: no such file")):
        content_hash(data)


def test_file_in_another_encoding_is_refused(tmp_path, rendered):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    data = DataConfig(name="text", source=DataSource.text, path=str(tmp_path / "latin.txt"))
    with pytest.raises(ConfigError, match=r"not UTF-8: 1, latin\.txt line 1, byte 0xe9.*iconv"):
        rendered(data)


def test_files_globs_and_lists_are_read_in_order_and_once(tmp_path, rendered):
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(f"Text {name}.")
    data = DataConfig(name="text", source=DataSource.text)
    data.path = f"{tmp_path}/*.txt"
    assert [origin for origin, _ in rendered(data)] == ["Text a.txt.", "Text b.txt.", "Text c.txt."]
    data.path = [f"{tmp_path}/c.txt", f"{tmp_path}/[ac].txt"]
    assert [origin for origin, _ in rendered(data)] == ["Text c.txt.", "Text a.txt."]


def test_hash_of_several_files_sees_each_and_their_order(tmp_path):
    hashes = set()
    for content in ("one", "two"):
        (tmp_path / "a.txt").write_text(content)
        (tmp_path / "b.txt").write_text("b")
        for names in (["a", "b"], ["b", "a"], ["a"]):
            data = DataConfig(name="text", source=DataSource.text, path=[f"{tmp_path}/{name}.txt" for name in names])
            hashes.add(content_hash(data))
    assert len(hashes) == 6


def test_text_is_streamed(tmp_path, tokenizer):
    """The first document is there before the last line is read: the last is no text at all."""
    (tmp_path / "long.txt").write_bytes(b"First.\n\n" + b"x" * 100_000 + b"\n\n\xff")
    data = DataConfig(name="text", source=DataSource.text, path=str(tmp_path / "long.txt"))
    tally = Tally.of(data)
    stream = render(data, tokenizer, tally)
    assert next(stream)[0] == "First." and not tally.left_out
    assert len(list(stream)) == 2 and tally.counts() == {"not UTF-8": 1}


def test_a_folder_is_its_files_of_text(tmp_path, rendered):
    for name, text in (("b.txt", "B."), ("sub/a.txt", "A."), ("c.jsonl", '{"text": "C."}'), ("d.txt.gz", "D.")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    for name in ("README.md", "dataset_info.json", "state.json", ".hidden.txt", ".git/x.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("no text")
    data = DataConfig(name="text", source=DataSource.text, path=str(tmp_path / "in"))
    assert [origin for origin, _ in rendered(data)] == ["B.", "C.", "D.", "A."]
    (tmp_path / "empty").mkdir()
    data.path = str(tmp_path / "empty")
    with pytest.raises(ConfigError, match="this folder has no file of text"):
        rendered(data)


def test_what_is_no_file_is_refused(tmp_path, rendered):
    data = DataConfig(name="text", source=DataSource.text, path="/dev/zero")
    with pytest.raises(ConfigError, match=r"data\.path=/dev/zero: no such file"):
        rendered(data)


def test_prompts_may_be_rows(source):
    data = source("selfgen", [{"prompt": "One?"}, {"messages": [{"role": "user", "content": "Two?"}]}], "a.jsonl")
    assert prompts(data) == ["One?", "Two?"]


def test_conversations_may_be_one_json_list(source, rendered):
    rows = [{"conversations": [{"from": "human", "value": text}]} for text in ("a", "b")]
    assert [origin for origin, _ in rendered(source("chat_jsonl", json.dumps(rows, indent=1)))] == ["a", "b"]


def test_alpaca_rows_may_be_json_lines(source, rendered):
    rows = [{"instruction": "Say hi.", "output": "hi"}, {"instruction": "Wave.", "output": "~"}]
    assert len(rendered(source("alpaca", rows, "data.jsonl"))) == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub data set of two files that was fetched before; the hub itself cannot be reached."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshot = tmp_path / "snapshots" / ("c0ffee" * 7)[:40]
    snapshot.mkdir(parents=True)
    (snapshot / "b.json").write_text('[{"instruction": "Wave.", "output": "~"}]')
    (snapshot / "a.jsonl").write_text('{"instruction": "Say hi.", "output": "hi"}')
    (snapshot / "README.md").write_text("no data")
    fetched = []

    def snapshot_download(repo, repo_type, revision, local_files_only):
        if repo != "owner/there":
            raise LocalEntryNotFoundError("nothing in the cache")
        assert (repo_type, local_files_only) == ("dataset", True)
        return str(snapshot)

    def download(repo, name, repo_type, revision):
        assert (repo, repo_type, revision) == ("owner/there", "dataset", snapshot.name)
        fetched.append(name)
        return str(snapshot / name)

    def unreachable(self, repo, revision=None):
        raise ConnectionError("no route\nto the hub")

    files._listing.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    return fetched


def test_hub_data_set_is_read_file_by_file_as_it_is_needed(hub, tokenizer):
    data = DataConfig(name="alpaca", source=DataSource.alpaca, repo="owner/there")
    stream = render(data, tokenizer, Tally.of(data))
    assert next(stream)[0] == "Say hi." and hub == ["a.jsonl"]
    assert [origin for origin, _ in stream] == ["Wave."] and hub == ["a.jsonl", "b.json"]
    assert (
        content_hash(data)
        == hashlib.sha256(json.dumps(["owner/there", ("c0ffee" * 7)[:40], ["a.jsonl", "b.json"]]).encode()).hexdigest()
    )


def test_copy_that_stands_in_for_the_hub_is_told(hub, caplog):
    data = DataConfig("alpaca", DataSource.alpaca, repo="owner/there")
    content_hash(data), files.find(data)
    said = "the hub cannot be asked for the data set owner/there (no route): using its copy of c0ffeec0ffee"
    assert caplog.messages == [said]


def test_hub_that_cannot_be_reached_says_what_to_do(hub):
    data = DataConfig(name="alpaca", source=DataSource.alpaca, repo="owner/elsewhere")
    said = "owner/elsewhere is not in the local hub cache and cannot be reached (no route): run `hf download"
    with pytest.raises(MissingError, match=re.escape(said)):
        content_hash(data)
