"""Models that were never taught to talk, and such without any tokenizer: the whole job, and what comes after it."""

import json
import shutil

import pytest
import torch

from qat.errors import ConfigError
from qat.stages import chat
from tests.stages.conftest import write_text


@pytest.fixture(scope="module")
def place(teacher, tmp_path_factory):
    """A base model with two ends beside itself without a tokenizer, and a text."""
    place = tmp_path_factory.mktemp("base")
    base = shutil.copytree(teacher.path, place / "base")
    (base / "manifest.json").unlink()
    (base / "chat_template.jinja").unlink()
    described = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(described | {"eos_token_id": [257, 260], "num_beams": 3}))
    bare = shutil.copytree(base, place / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    write_text(place / "text.txt")
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    (place / "chat_jsonl.json").write_text(json.dumps({"messages": said}))
    (place / "alpaca.json").write_text(json.dumps([{"instruction": "Why?", "output": "Because."}]))
    return place


@pytest.fixture(scope="module")
def trained(job, place):
    return job("base", "data=text", f"data.path={place / 'text.txt'}", "evaluate.sample_tokens=4")


@pytest.fixture(scope="module")
def best(trained):
    return f"checkpoint={trained[0] / 'checkpoints' / 'best'}"


def test_a_base_model_goes_the_whole_way_on_text(trained):
    folder, result = trained
    assert result["status"] == "complete" and result["metrics"]["kl"] > 0
    samples = (folder / "samples.md").read_text()
    assert samples.startswith("# The same texts, gone on with by each model, which has no chat template")
    for name in ("teacher", "converted", "distilled"):
        assert samples.count(f"**{name}**") == samples.count("\n## ") == 5
    assert "## The capital of France is\n" in samples


def continued(teacher, text, tokens):
    """What the model itself writes after a text, the likeliest token one after the other, to either end."""
    model, tokenizer = teacher.load(torch.float32, torch.device("cpu")), teacher.tokenizer()
    ids = [256, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    written = []
    while len(written) < tokens and not {257, 260} & set(written):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return tokenizer.decode(written, skip_special_tokens=True)


def test_samples_are_the_likeliest_continuations(trained, teacher):
    said = continued(teacher, "The sky is blue because", 4).strip().splitlines() or ["(nothing)"]
    sample = (trained[0] / "samples.md").read_text().split("## The sky is blue because\n\n**teacher**\n\n")[1]
    assert sample.startswith("".join(f"> {line}\n" for line in said))


def test_training_text_may_come_from_the_model_itself(job):
    folder, result = job("base", "stage=cache", "data=tokens", "data.documents=120", "data.answer_tokens=12")
    documents = next((folder.parent / "artifacts" / "documents").glob("tokens-*/documents.jsonl"))
    rows = [json.loads(line)["tokens"] for line in documents.read_text().splitlines()]
    ends = {row[-1] for row in rows if len(row) < 14}
    assert result["status"] == "complete" and ends and ends <= {257, 260}
    assert not any({257, 260} & set(row[2:-1]) for row in rows)


@pytest.mark.parametrize("data", ["selfgen", "prompts", "questions", "alpaca", "chat_jsonl"])
def test_what_needs_a_chat_template_is_refused_before_anything_is_made(job, place, data):
    before = set((place / "outputs" / "artifacts").rglob("*"))
    own = [f"data.path={place / data}.json"] if data in ("alpaca", "chat_jsonl") else []
    with pytest.raises(ConfigError, match="no chat template: use data=tokens, openings or text"):
        job("base", f"data={data}", *own)
    assert set((place / "outputs" / "artifacts").rglob("*")) == before


def test_chat_goes_on_with_the_text_and_says_so(configured, best, teacher, monkeypatch, capsys):
    heard = []
    monkeypatch.setattr(chat, "stream", lambda model, tokenizer, asked, settings, file: heard.append((asked, settings)))
    chat.main(configured("base", "stage=chat", best, "chat.prompt=Once upon"))
    ((asked, settings),) = heard
    assert asked == [256, *teacher.tokenizer()("Once upon", add_special_tokens=False)["input_ids"]]
    assert settings.eos_token_id == [257, 260]
    assert capsys.readouterr().out.startswith("base has no chat template that takes a question: it goes on with the")
    with pytest.raises(ConfigError, match=r"^chat\.thinking=true: base has no chat template"):
        chat.main(configured("base", "stage=chat", best, "chat.thinking=true"))


@pytest.mark.parametrize("text", ["hello there", "The end"])
def test_chat_goes_by_its_own_settings_whatever_the_folder_says(configured, teacher, capsys, text):
    """The folder asks for beams, which would say something else."""
    chat.main(configured("base", "stage=chat", f"chat.prompt={text}", "chat.max_tokens=24"))
    assert capsys.readouterr().out.split("\n", 1)[1] == f"{continued(teacher, text, 24)}\n"


@pytest.mark.parametrize("model", ["base", "bare"])
@pytest.mark.parametrize("name", ["hf", "packed", "anemll_v2"])
def test_exports_need_neither_template_nor_tokenizer_and_keep_every_end(job, best, place, name, model):
    output = place / "exports" / f"{name}-{model}"
    _, result = job(model, "stage=export", best, f"export={name}", f"export.output={output}")
    assert result["status"] == "complete" and result["metrics"]["parity"] < 0.1
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [257, 260]
    assert (output / "tokenizer.json").is_file() is (model == "base")


def test_without_a_tokenizer_a_cache_is_trained_and_measured_on_and_nothing_is_said(job, trained, best):
    cached, conversion = (trained[1]["paths"][name] for name in ("cache", "conversion"))
    _, again = job("bare", "stage=distill", f"checkpoint={conversion}", "cache=local", f"cache.path={cached}")
    assert again["metrics"]["kd_loss_final"] == pytest.approx(trained[1]["metrics"]["kd_loss_final"], rel=1e-4)
    folder, result = job("bare", "stage=evaluate", best, "cache=local", f"cache.path={cached}")
    assert result["metrics"]["kl"] == pytest.approx(trained[1]["metrics"]["kl"], rel=1e-4)
    assert not (folder / "samples.md").exists() and "samples" not in result["paths"]


@pytest.mark.parametrize(
    "words",
    [
        ("data=text", "data.path={text}"),
        ("data=tokens",),
        ("stage=evaluate", "evaluate.text={text}"),
        ("stage=cache", "cache=local", "cache.path={cache}", "cache.inspect=true"),
    ],
)
def test_without_a_tokenizer_whatever_needs_text_is_refused(job, trained, place, words):
    named = {"text": place / "text.txt", "cache": trained[1]["paths"]["cache"]}
    with pytest.raises(ConfigError, match="bare has no tokenizer, which text needs"):
        job("bare", *(word.format(**named) for word in words))


def test_chat_without_a_tokenizer_is_refused(configured, best):
    with pytest.raises(ConfigError, match="bare has no tokenizer"):
        chat.main(configured("bare", "stage=chat", best, "chat.prompt=hi"))
