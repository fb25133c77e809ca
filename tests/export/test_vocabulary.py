"""Tokenizers through GGUF files: llama.cpp and what is read back make of text what the model's own does."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qat.errors import ConfigError
from qat.export.gguf import FILE, writer
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
