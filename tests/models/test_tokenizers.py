"""Tokenizers as folders have them, and all the tokens that end a text."""

import json
import shutil

import pytest

from qat.errors import ConfigError
from qat.models import tokenizers

END, OTHER, BEGIN = "<|end|>", "<|user|>", "<|begin|>"  # 257, 259, 256


def checked(folder):
    found = folder.located()
    tokenizer = found.tokenizer()
    tokenizers.check(found.path, tokenizer, found.vocab_size())
    return tokenizer


@pytest.mark.parametrize(
    ("config", "generation", "own", "ends"),
    [
        (257, None, END, (257,)),
        ([257, 260], None, END, (257, 260)),
        (256, [257, 260], OTHER, (256, 257, 259, 260)),
        (None, None, OTHER, (259,)),
        (None, 260, None, (260,)),
        (257, [9999, -1], END, (257,)),
        (None, None, None, ()),
    ],
)
def test_every_file_may_name_ends_and_all_of_them_count(folder, config, generation, own, ends):
    folder.settings(eos_token_id=config).settings("tokenizer_config.json", eos_token=own, pad_token=None)
    folder.settings("generation_config.json", eos_token_id=generation)
    assert folder.located().ends() == ends


@pytest.mark.parametrize(
    ("settings", "end", "pad"),
    [
        ({}, 257, 257),
        ({"pad_token": OTHER}, 257, 259),
        ({"pad_token": None}, 257, 257),
        ({"eos_token": None, "pad_token": None}, 257, 257),
        ({"eos_token": None, "pad_token": None, "bos_token": None}, 257, 257),
    ],
)
def test_a_tokenizer_without_marks_of_its_own_takes_the_models(folder, settings, end, pad):
    tokenizer = checked(folder.settings("tokenizer_config.json", **settings))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)
    padded = tokenizer.pad({"input_ids": [[1], [2, 3, 4]]})
    assert padded["input_ids"][0] == [pad, pad, 1] and padded["attention_mask"][0] == [0, 0, 1]


def test_a_model_without_any_end_is_padded_with_whatever_there_is(folder):
    (folder.path / "generation_config.json").unlink()
    folder.settings(eos_token_id=None).settings("tokenizer_config.json", eos_token=None, pad_token=None)
    tokenizer = checked(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 0)


def test_a_larger_head_than_the_tokenizer_is_no_fault_and_a_smaller_one_is(folder, causal):
    assert len(checked(folder)) < folder.located().vocab_size()
    small = causal("Llama", vocab_size=250, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with pytest.raises(ConfigError, match=r"tokens up to number 260 \(<\|assistant\|>\) and the model knows 250"):
        checked(small)


def test_a_folder_without_tokenizer_is_a_model_all_the_same(folder):
    for file in folder.path.glob("tokenizer*"):
        file.unlink()
    found = folder.located()
    assert not found.has_tokenizer() and found.ends() == (257,)
    with pytest.raises(ConfigError, match=r"odd has no tokenizer, which text needs"):
        found.tokenizer()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"model": {"type": "none such"}}'])
def test_a_damaged_tokenizer_is_told(folder, content):
    (folder.path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"the tokenizer of .*odd cannot be read"):
        checked(folder)


def test_an_end_that_the_vocabulary_lacks_is_told(folder):
    """transformers would make it a token that the model never saw."""
    folder.settings("tokenizer_config.json", eos_token="<|none such|>")
    with pytest.raises(ConfigError, match=r"names <\|none such\|> as its eos_token, and its vocabulary has no such"):
        checked(folder)


def test_a_vocabulary_of_the_older_kind_is_read(folder, teacher):
    vocabulary = teacher.tokenizer().get_vocab()
    (folder.path / "tokenizer.json").unlink()
    (folder.path / "vocab.json").write_text(json.dumps(vocabulary))
    (folder.path / "merges.txt").write_text("#version: 0.2\n")
    marks = {"eos_token": END, "bos_token": BEGIN, "unk_token": END, "pad_token": END}
    folder.settings("tokenizer_config.json", tokenizer_class="GPT2Tokenizer", **marks)
    text = "Grüße, 世界 <3\n"
    assert checked(folder)(text)["input_ids"] == teacher.tokenizer()(text)["input_ids"]


def test_settings_alone_are_no_tokenizer(folder):
    (folder.path / "tokenizer.json").unlink()
    assert (folder.path / "tokenizer_config.json").is_file() and not folder.located().has_tokenizer()


def test_a_vocabulary_that_knows_no_text_is_told(folder, tmp_path):
    described = json.loads((folder.path / "tokenizer.json").read_text())
    described["model"] |= {"vocab": {}, "merges": []}
    described["added_tokens"] = described["added_tokens"][:2]
    shutil.rmtree(tmp_path / "artifacts", ignore_errors=True)
    (folder.path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="makes nothing of a sentence: its vocabulary is missing"):
        checked(folder)
