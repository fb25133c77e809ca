"""SmolLM2 in the engines themselves: through their templates and ends it answers word for word what ours answers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.config import ExportConfig, ExportType
from qat.conversion.convert import install
from qat.evaluate.answers import settings_of
from qat.export.gguf import FILE
from qat.export.source import Source
from qat.models import ModelFolder
from qat.quant.architectures import select
from qat.quant.linear import baked
from qat.quant.places import matrix
from tests import smollm2, tiny
from tests.export import engines, llama
from tests.export.llama import served

TOKENS = 6
NEAR = 0.3  # between logits that llama.cpp may rank otherwise, as it rounds what enters a product to 8 bits


@dataclass(frozen=True)
class Answer:
    """What a student writes after a prompt: tokens without the end, and the logits [T, V] of each and of the end."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor

    def margin(self, other: list[int], ends: tuple[int, ...]) -> float:
        """By how much it prefers its own token to another answer's, where the two part for the first time."""
        same = next((n for n, (a, b) in enumerate(zip(self.tokens, other, strict=False)) if a != b), len(other))
        return float(self.logits[same].max() - self.logits[same, other[same : same + 1] or list(ends)].max())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> ModelFolder:
    return smollm2.folder(tmp_path_factory)


@pytest.fixture(scope="module")
def source(teacher) -> Source:
    """Rounded to the nearest, embedding and all, on a grid that each of the engines holds: that of Q4_0."""
    model = teacher.load(torch.float32, tiny.CPU)
    layers = select(model, engines.preset("gguf_q4_0"))
    with torch.no_grad():
        install(model, {layer.name: engines.rounded(layer, matrix(model, layer.name)) for layer in layers})
    return Source(teacher, model)


@pytest.fixture(scope="module")
def ours(source) -> list[Answer]:
    with baked(source.model, torch.float32):
        return answers(source.model, source.teacher)


@torch.no_grad()
def answers(model: PreTrainedModel, teacher: ModelFolder) -> list[Answer]:
    """What a model of transformers writes after the prompts, greedily."""
    tokenizer, ends = teacher.tokenizer(), teacher.ends()
    asked = [tokenizer.apply_chat_template(engines.chat(text), add_generation_prompt=True) for text in engines.PROMPTS]
    rows = tokenizer.pad(asked, padding_side="left", return_tensors="pt")
    told = {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**rows, generation_config=settings_of(tokenizer, ends, TOKENS), **told)
    written = found.sequences[:, rows["input_ids"].shape[1] :].tolist()
    logits = torch.stack(found.logits, 1)
    return [
        Answer(prompt["input_ids"], without(ends, tokens), said)
        for prompt, tokens, said in zip(asked, written, logits, strict=True)
    ]


def without(ends: tuple[int, ...], tokens: list[int]) -> list[int]:
    return [token for token in tokens if token not in ends]


def words(teacher: ModelFolder, rows: list[list[int]]) -> list[str]:
    return [text.strip() for text in teacher.tokenizer().batch_decode(rows, skip_special_tokens=True)]


def test_llama_cpp_answers_word_for_word_but_for_near_ties(source, ours, tmp_path: Path):
    pytest.importorskip("xllamacpp", reason="the engine xllamacpp is not installed: pip install -e '.[engines]'")
    from qat.export.gguf import writer

    writer.write(source, tmp_path, ExportConfig("gguf", "gguf", ExportType.fp32))
    server, ends = served(tmp_path / FILE), source.teacher.ends()
    for text, answer in zip(engines.PROMPTS, ours, strict=True):
        assert llama.tokens(server, llama.asked(server, engines.chat(text))) == answer.prompt
        asked = {"messages": engines.chat(text), "temperature": 0.0, "max_tokens": TOKENS, "logprobs": True}
        (said,) = server.handle_chat_completions(asked | {"cache_prompt": False})["choices"]
        tokens = without(ends, [token["id"] for token in said["logprobs"]["content"]])
        assert tokens == answer.tokens or answer.margin(tokens, ends) < NEAR
        assert [said["message"]["content"].strip()] == words(source.teacher, [tokens])


def test_mlx_answers_word_for_word(source, ours, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="the engine mlx is not installed: pip install -e '.[engines]'")
    mlx_lm = pytest.importorskip("mlx_lm", reason="the engine mlx-lm is not installed: pip install -e '.[engines]'")
    from qat.export.mlx import writer

    writer.write(source, tmp_path, ExportConfig("mlx", "mlx", ExportType.fp16))
    model, tokenizer = mlx_lm.load(str(tmp_path))
    model.set_dtype(mx.float32)  # it computes fp16 some fifty times more slowly on processors
    caching = pytest.importorskip("mlx_lm.models.cache")
    asked = [tokenizer.apply_chat_template(engines.chat(text), add_generation_prompt=True) for text in engines.PROMPTS]
    alike = next(place for place, tokens in enumerate(zip(*asked, strict=False)) if len(set(tokens)) > 1)
    begun, said = caching.make_prompt_cache(model), []
    for prompt in asked:
        steps = mlx_lm.stream_generate(
            model, tokenizer, prompt[begun[0].offset :], max_tokens=TOKENS, prompt_cache=begun
        )
        said.append("".join(step.text for step in steps))
        caching.trim_prompt_cache(begun, begun[0].offset - alike)  # how all prompts begin is read once
    assert [text.strip() for text in said] == words(source.teacher, [answer.tokens for answer in ours])


def test_transformers_answers_word_for_word_by_compressed_tensors(source, ours, tmp_path):
    reason = "the engine compressed_tensors is not installed: pip install -e '.[engines]'"
    pytest.importorskip("compressed_tensors", reason=reason)
    from qat.export.compressed import writer

    writer.write(source, tmp_path, ExportConfig("compressed", "compressed", ExportType.fp32))
    made = answers(writer.read(source, tmp_path), source.teacher)
    assert [answer.tokens for answer in made] == [answer.tokens for answer in ours]
