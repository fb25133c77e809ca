"""llama.cpp itself, with a file: what it makes of text, and what it says comes next."""

import json
import urllib.request

import pytest
import torch

from qat.models import tiny as tiny_model


def served(file):
    """llama.cpp with a file, without a rounded cache of keys and values."""
    xllamacpp = pytest.importorskip(
        "xllamacpp", reason="the engine xllamacpp is not installed: pip install -e '.[engines]'"
    )
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = str(file), 256, 1, 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked.warmup, asked.verbosity = False, -1
    return xllamacpp.Server(asked)


def next_token(server, ids) -> torch.Tensor:
    """llama.cpp's log-probabilities [V] of what follows some tokens."""
    asked = {"prompt": ids.tolist(), "n_predict": 1, "n_probs": tiny_model.VOCABULARY, "temperature": 0.0}
    (said,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    found = torch.full((tiny_model.VOCABULARY,), torch.nan)
    for one in said["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    return found


def asked(server, messages: list[dict[str, str]]) -> str:
    """What llama.cpp's chat template makes of messages."""
    return _post(server, "apply-template", {"messages": messages})["prompt"]


def tokens(server, text: str) -> list[int]:
    """What llama.cpp makes of a text, special tokens in it included."""
    return _post(server, "tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]


def _post(server, path: str, asked: dict) -> dict:
    with urllib.request.urlopen(f"{server.listening_address}/{path}", data=json.dumps(asked).encode()) as answer:
        return json.load(answer)
