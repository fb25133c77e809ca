"""Free running: what models say to the same prompts when nobody shows them the next token.

KL is measured on text that is there; a student that is close to its teacher on it may still ramble on its own. Each
model answers greedily, and once drawn at temperature 1 by the same draws. Of its answers are told: the share that
ends by itself, how long they are, the share of 4-grams of an answer that are different (a model that repeats itself
has few, as in Welleck et al. 2020, arXiv 1908.04319), and how many tokens a greedy answer has in common with the
teacher's before the first that differs.
"""

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from transformers import PreTrainedModel

from qat.console import progress
from qat.data.asking import asked, takes_questions
from qat.errors import ConfigError
from qat.generation import TEXTS_A_ROW, Sampling, answers, rows_at_once, writer
from qat.machine import Machine
from qat.models import ModelFolder
from qat.quant.linear import baked
from qat.seeds import mixed
from qat.shown import shown

GREEDY, DRAWN = "greedy", "drawn"
SEED = 0  # of what is drawn: the same for every model and run
GRAM = 4  # tokens of what may be repeated
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1f2933 }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem }}
section {{ display: grid; gap: .75rem; grid-template-columns: repeat({models}, minmax(0, 1fr)) }}
article {{ background: #f5f7fa; padding: .5rem .75rem; white-space: pre-wrap; overflow-wrap: anywhere }}
small {{ display: block; color: #616e7c }}
</style>
<h1>{title}</h1>
{body}
</html>
"""

Answers = dict[str, list[list[int]]]  # tokens, by how they were chosen
Figures = dict[str, dict[str, float]]  # means by how tokens were chosen, each with its standard error `<name>_stderr`


@dataclass(frozen=True)
class Said:
    """The answers of one model, and what is told of them."""

    answers: Answers
    figures: Figures


class FreeRunning:
    """The same prompts for several models; the first to answer is the one that others are compared with."""

    def __init__(self, teacher: ModelFolder, count: int, tokens: int, machine: Machine) -> None:
        """Prepares the first `count` prompts of the package for answers of at most `tokens` tokens.

        Raises:
            ConfigError: the teacher takes no questions, or not so many tokens.
        """
        self._teacher, self._machine, self._tokenizer = teacher, machine, teacher.tokenizer()
        if not takes_questions(self._tokenizer):
            raise ConfigError(f"evaluate.answers: {teacher.name} has no chat template that takes a question")
        self.prompts = prompts()[:count]
        self._asked = [asked(self._tokenizer, prompt) for prompt in self.prompts]
        self._sampling = Sampling(tokens, tokens, 1.0, teacher.ends())
        self.said: dict[str, Said] = {}
        longest, context = max(map(len, self._asked)) + tokens, teacher.context()
        if context is not None and longest > context:
            raise ConfigError(
                f"evaluate.answer_tokens={tokens}: with what comes before, {longest} tokens, and {teacher.name} is made"
                f" for at most {context}"
            )

    def hear(self, name: str, model: PreTrainedModel, of: ModelFolder | None = None) -> Figures:
        """Lets a model answer every prompt, greedily and drawn; `of` has its weights where the teacher has others."""
        folder = of or self._teacher
        with baked(model, self._machine.dtype):
            greedy = self._write(folder, model, self._sampling, f"{name}, {GREEDY}")
            drawn = self._write(folder, model, replace(self._sampling, greedy=0), f"{name}, {DRAWN}")
        found = {GREEDY: greedy, DRAWN: drawn}
        figures = {kind: told(said, self._sampling.ends) for kind, said in found.items()}
        if self.said:
            first = next(iter(self.said.values()))
            shared = map(common, greedy, first.answers[GREEDY])
            figures[GREEDY] |= with_error("agreeing", list(map(float, shared)))
        self.said[name] = Said(found, figures)
        return figures

    def page(self) -> str:
        """All answers side by side, as HTML that shows just these words and runs nothing."""
        title = f"{len(self.prompts)} prompts, answered by {' and '.join(self.said)}"
        body = "\n".join(self._beside(number) for number in range(len(self.prompts)))
        return PAGE.format(title=_text(title), models=len(self.said), body=body)

    def _write(self, folder: ModelFolder, model: PreTrainedModel, sampling: Sampling, what: str) -> list[list[int]]:
        longest, found = max(map(len, self._asked)), list[list[int]]()
        rows = min(len(self._asked), rows_at_once(folder.settings(), self._machine, longest, sampling))
        write = writer(folder, model, self._asked, sampling, rows)
        with progress(f"answers of {what}", len(self._asked) * sampling.tokens, "tokens") as advance:
            for first in range(0, len(self._asked), TEXTS_A_ROW * rows):
                written_NA = write(self._asked[first : first + TEXTS_A_ROW * rows], mixed(SEED, first), advance)
                found += answers(written_NA, sampling.ends)
        return found

    def _beside(self, number: int) -> str:
        cells = [
            self._cell(name, kind, said.answers[kind][number])
            for kind in (GREEDY, DRAWN)
            for name, said in self.said.items()
        ]
        return f"<h2>{_text(self.prompts[number])}</h2>\n<section>{''.join(cells)}</section>"

    def _cell(self, name: str, kind: str, answer: list[int]) -> str:
        how = "ended" if ended(answer, self._sampling.ends) else "cut off"
        text = str(self._tokenizer.decode(answer, skip_special_tokens=True)).strip()
        note = f"{name}, {kind}: {how} after {len(answer)} tokens"
        return f"<article><small>{_text(note)}</small>{_text(text)}</article>"


def prompts() -> list[str]:
    """The package's prompts, which no list of training prompts of its own has."""
    lines = files("qat.evaluate").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def told(said: Sequence[list[int]], ends: Sequence[int]) -> dict[str, float]:
    """Means over answers: share that ends by itself, tokens, share of different 4-grams; with standard errors."""
    different = [share for answer in said if (share := distinct(answer)) is not None]
    return {
        **with_error("ended", [float(ended(answer, ends)) for answer in said]),
        **with_error("tokens", [float(len(answer)) for answer in said]),
        **with_error("distinct", different),
    }


def ended(answer: list[int], ends: Sequence[int]) -> bool:
    """Whether an answer came to its end by itself."""
    return bool(answer) and answer[-1] in ends


def distinct(answer: list[int]) -> float | None:
    """The share of an answer's 4-grams that are different; None where it has none."""
    grams = [tuple(answer[place : place + GRAM]) for place in range(len(answer) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else None


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two answers have in common before the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def with_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """A mean with its standard error, which one value alone has none of; nothing where there are no values."""
    if not values:
        return {}
    error = {} if len(values) < 2 else {f"{name}_stderr": statistics.stdev(values) / len(values) ** 0.5}
    return {name: statistics.fmean(values), **error}


def _text(said: str) -> str:
    return html.escape(shown(said))
