"""Tokenizers through GGUF files: llama.cpp and what is read back make of text what the model's own does."""

import io
import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from qat.errors import ConfigError
from qat.export.gguf import EXPORTER, FILE, characters, vocabulary, writer
from qat.export.source import Source
from qat.models import ModelFolder, gguf_header, gguf_tokenizer, splits, tokenizers
from qat.models import tiny as tiny_model
from tests import tiny
from tests.export.llama import served, tokens
from tests.export.test_gguf import EXACT

MARKS = ["<|begin|>", "<|end|>", "<|user|>"]
ODD = (
    "I have  12  345 things, 6789012 in all",
    "  two before, two after  ",
    "one\n\n\ntwo \n three\t\tfour\r\n\r\n five",
    "don't I'LL we'Ve they're 'tis",
    "na\u00efve caf\u00e9 \u00c9COLE Stra\u00dfe CamelCase XMLHttp",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u7b2c3\u7ae0",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 and \U0001f642\U0001f642",
    "x=1+22;//foo/bar\r\n  #!?...",
    "\u0661\u0662\u0663 \u00bd \u2167 10\u00b2",
    "<|user|>Hi 42<|end|>\n<|begin|> there",
)


def trained(before: dict, whole: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose merges cross every boundary of the odd texts, so that splits alone keep them apart."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text[start:] for text in ODD for start in range(len(text))],
        trainers.BpeTrainer(
            vocab_size=tiny_model.VOCABULARY, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    described = json.loads(made.to_str())
    described["pre_tokenizer"], described["model"]["ignore_merges"] = before, whole
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token=MARKS[0], eos_token=MARKS[1]
    )


def file_with(tokenizer: PreTrainedTokenizerFast, path) -> ModelFolder:
    """The tiny model with another tokenizer, and its GGUF file beside it."""
    tiny_model.write(path, tiny_model.VOCABULARY)
    tokenizer.save_pretrained(path)
    folder = ModelFolder("tiny", path, "tiny")
    writer.write(Source(folder, folder.load(torch.float32, tiny.CPU)), path, EXACT)
    return folder


def read_back(path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file."""
    file, folder = path / FILE, path / "read"
    gguf_tokenizer.write(file, gguf_tokenizer.splits_of(file, gguf_header.check(file)), folder)
    return tokenizers.load(folder)


@pytest.mark.parametrize("name", splits.STEPS)
def test_text_is_split_alike_by_llama_cpp_and_by_what_is_read_back(name, tmp_path):
    tokenizer = trained(*splits.named(name))
    file_with(tokenizer, tmp_path)
    server, again = served(tmp_path / FILE), read_back(tmp_path)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ODD]
    assert [tokens(server, text) for text in ODD] == expected
    assert [again(text, add_special_tokens=False)["input_ids"] for text in ODD] == expected
    plain = tokenizer.backend_tokenizer
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert [plain.encode(text).ids for text in ODD] != expected


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ({"tokenizer.ggml.model": "gpt2"}, r"a\.gguf does not say how its tokenizer splits text"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smolm"}, r"calls smolm \(did you mean smollm\?\)"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default"}, "calls default"),
    ],
)
def test_a_file_that_names_no_known_splits_is_refused(texts, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        gguf_tokenizer.splits_of(tmp_path / "a.gguf", texts)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """The file of a model that SentencePiece trained on the odd texts, with bytes for what is rare."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece, which mlx-lm brings, is not installed")
    made, lines = io.BytesIO(), [*ODD, *(text.replace("\n", " ") for text in ODD)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3),
        model_writer=made,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        max_sentencepiece_length=8,
        user_defined_symbols=["[INST]"],
        minloglevel=5,
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return folder


@pytest.mark.parametrize(("kind", "begin"), [(LlamaTokenizer, "<s>"), (GemmaTokenizer, "")])
def test_llama_cpp_merges_characters_and_falls_back_to_bytes_alike(kind, begin, sentencepiece_model, tmp_path, capsys):
    folder = file_with(kind.from_pretrained(sentencepiece_model), tmp_path)
    server, tokenizer = served(tmp_path / FILE), folder.tokenizer()
    texts = [f"{before}{text}</s>" for text in ODD for before in (begin, f"{begin} ", "<s>[INST]", "</s> [INST] ")]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [tokens(server, text) for text in texts] == expected
    named = {token for ids in expected for token in tokenizer.convert_ids_to_tokens(ids)}
    assert any(map(characters.is_byte, named)) and "[INST]" in named
    assert ("begins with neither a special token" in " ".join(capsys.readouterr().out.split())) == bool(begin)


def of_characters(**changed) -> dict:
    """A `tokenizer.json` with two merges."""
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "vocab": {letters: i for i, letters in enumerate(["a", "b", "c", "ab", "abc"])},
    }
    return {"added_tokens": [], "normalizer": None, "model": model | {"merges": ["a b", "ab c"]}} | changed


def test_bytes_are_told_from_characters_whatever_a_version_of_transformers_writes():
    described = of_characters(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    assert not characters.merged(described)  # `byte_fallback`, and no byte to fall back to
    described["model"]["vocab"]["<0x00>"] = 5
    assert characters.merged(described)


@pytest.mark.parametrize("steps", [[], [{"type": "NFC"}]])
def test_a_sequence_of_no_change_changes_nothing(steps):
    described = of_characters(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    described["normalizer"] = {"type": "Sequence", "normalizers": steps}
    assert vocabulary.splits(described) == "gpt-2"
    described["normalizer"]["normalizers"] = [*steps, {"type": "Lowercase"}]
    with pytest.raises(ConfigError, match=r"changes text .*Lowercase"):
        vocabulary.splits(described)


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
PREPENDED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}


def test_merges_become_scores_and_prefixes_are_told_as_they_are():
    assert characters.scores(of_characters()) == {"ab": 0.0, "abc": -1.0}
    assert characters.prefixed(of_characters(normalizer=PREPENDED, pre_tokenizer=None)) == (True, "")
    assert characters.prefixed(of_characters(pre_tokenizer=METASPACE)) == (True, "a text that begins with a space")
    assert characters.prefixed(of_characters(pre_tokenizer=METASPACE | {"prepend_scheme": "never"})) == (False, "")


def test_characters_that_llama_cpp_would_merge_otherwise_are_refused():
    missing = of_characters()
    missing["model"]["vocab"]["bc"] = 5
    with pytest.raises(ConfigError, match="merges any two tokens that make a third, and this tokenizer not"):
        characters.scores(missing)
    torn = of_characters()
    torn["model"]["vocab"]["bc"] = 5
    torn["model"]["merges"] = ["ab c", "b c", "a b", "a bc"]
    with pytest.raises(ConfigError, match=r"one token after the other, and this tokenizer not \(abc\)"):
        characters.scores(torn)
    with pytest.raises(ConfigError, match="does before it merges characters"):
        characters.prefixed(of_characters(pre_tokenizer=METASPACE | {"split": True}))


@pytest.mark.parametrize(
    ("name", "whole", "told"), [("qwen2", True, "merges words"), ("tekken", False, "merges no words")]
)
def test_words_that_are_tokens_count_where_merges_do_not_make_them(name, whole, told):
    described = json.loads(trained(splits.named(name)[0], whole).backend_tokenizer.to_str())
    assert vocabulary.splits(described) == name
    described["model"]["merges"] = described["model"]["merges"][:-1]
    with pytest.raises(ConfigError, match=told):
        vocabulary.splits(described)


def ending(tmp_path, ends: list[str], capsys) -> tuple[list[int], str]:
    """What stays of a text of these ends that llama.cpp is made to write, and what was said of them."""
    tokenizer = tiny_model.byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ends})
    folder = file_with(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings["eos_token_id"] = [257, *tokenizer.convert_tokens_to_ids(ends)]
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    folder = ModelFolder("tiny", tmp_path, "tiny")
    writer.write(Source(folder, folder.load(torch.float32, tiny.CPU)), tmp_path, EXACT)
    server = served(tmp_path / FILE)
    stopped = []
    for token in ends:
        number = tokenizer.convert_tokens_to_ids(token)
        asked = {"prompt": "a", "n_predict": 3, "logit_bias": [[number, 1000.0]]}
        choice = server.handle_completions(asked)["choices"][0]
        stopped.append(choice["finish_reason"] == "stop")
    return stopped, " ".join(capsys.readouterr().out.split())


def test_every_end_ends_an_answer_or_is_named(tmp_path, capsys):
    stopped, said = ending(tmp_path, ["<one>", "<two>", "<|eot_id|>", "<|im_end|>", "<three>"], capsys)
    assert stopped == [True, True, True, True, False]
    assert "not at <three>" in said


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    tiny_model.write(tmp_path, tiny_model.VOCABULARY)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"bare has no tokenizer, without which llama\.cpp does not run a file"):
        EXPORTER.refuse_tokenizer(ModelFolder("bare", tmp_path, "bare"))


def test_names_decide_whether_llama_cpp_swallows_spaces(tmp_path, capsys):
    plain = file_with(tiny_model.byte_tokenizer(), tmp_path / "plain")
    assert vocabulary.file_name(ModelFolder("My-Phi-3-mini", plain.path, "")) == "My-phi 3-mini"
    tokenizer = trained(*splits.named("gpt-2"))
    swallowing = {
        name: name not in vocabulary.KEPT_BEHIND for name in ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|x|>")
    }
    made = Tokenizer(tokenizer.backend_tokenizer.model)
    made.add_special_tokens([AddedToken(name, rstrip=strip, normalized=False) for name, strip in swallowing.items()])
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((plain.path / "config.json").read_text())
    assert vocabulary.file_name(ModelFolder("student", tmp_path, "")) == "student (phi-3)"
    assert not capsys.readouterr().out
