"""Turns: whether training text shows before each answer what a chat will show at that place.

A chat template is written for the next answer. Of answers that are there it may say something else: Qwen3's puts empty
thoughts before the last one alone, and drops what was thought earlier. A student that learns from the one is then
asked with the other. So the prompt that a chat would build is made for every answer of a conversation and compared,
token by token, with what comes before that answer in its rendering. Where both are the same it is known where the
answer begins, which whoever learns from answers alone has to know (`spans`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from qat.data import marks
from qat.data.reading import PIECE
from qat.data.tally import Turns, Unusable
from qat.data.thinking import Rendering, template

SHOWN = 40  # characters of either side that a message shows

Spans = list[tuple[int, int]]  # first token of each answer, and the one behind its last


@dataclass(frozen=True)
class Answer:
    """An answer that follows what a user or a tool said.

    Attributes:
        number: of its message.
        begins: tokens of a chat's prompt for it.
        difference: what a chat would show before it instead; empty where that is the same.
    """

    number: int
    begins: int
    difference: str = ""


def answers(tokenizer: PreTrainedTokenizerBase, rendering: Rendering, whole: list[int]) -> list[Answer]:
    """Looks at every answer of a rendering, of whose first `PIECE` characters `whole` has the tokens."""
    roles = [message["role"] for message in rendering.messages]
    asked = [n for n, role in enumerate(roles) if role == "assistant" and n and roles[n - 1] != "assistant"]
    return [_compared(tokenizer, rendering, number, whole) for number in asked]


def told(found: list[Answer]) -> Turns:
    """How many of them follow other tokens than in a chat."""
    differing = [answer.difference for answer in found if answer.difference]
    return Turns(len(found), len(differing), next(iter(differing), ""))


def spans(
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    found: list[Answer],
    whole: list[int],
    ends: Collection[int],
) -> Spans:
    """Where answers lie among a rendering's tokens, each with the token that ends it.

    Those are left out that follow other tokens than in a chat.

    Raises:
        Unusable: an answer goes on without a token that ends it, so nobody knows where.
    """
    return [_span(tokenizer, rendering, one, whole, ends) for one in found if not one.difference]


def _span(
    tokenizer: PreTrainedTokenizerBase, rendering: Rendering, answer: Answer, whole: list[int], ends: Collection[int]
) -> tuple[int, int]:
    until, last = rendering.messages[: answer.number + 1], answer.number + 1 == len(rendering.messages)
    closed = whole if last else marks.of(tokenizer).tokens(template(tokenizer, until, rendering.mode, rendering.tools))
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(closed, whole, strict=False)))
    end = next((place for place in range(answer.begins, same) if whole[place] in ends), None)
    if end is None and not last:
        raise Unusable("an answer that none of the tokens ends that end what the model says", damaged=False)
    return answer.begins, len(whole) if end is None else end + 1


def _compared(tokenizer: PreTrainedTokenizerBase, rendering: Rendering, number: int, whole: list[int]) -> Answer:
    before = rendering.messages[:number]
    try:
        prompt = template(tokenizer, before, rendering.mode, rendering.tools, add_generation_prompt=True)
        asked = marks.of(tokenizer).tokens(prompt)
    except Unusable as refused:
        return Answer(number, 0, f"a chat cannot ask that: {refused.reason}")
    return Answer(number, len(asked), _difference(rendering.text, prompt, whole, asked))


def _difference(text: str, prompt: str, whole: list[int], asked: list[int]) -> str:
    """What differs between a text and the prompt that it should begin with; nothing where nothing does."""
    if not text.startswith(prompt):
        pairs = enumerate(zip(text, prompt, strict=False))
        place = next((place for place, (a, b) in pairs if a != b), len(text))
    elif len(prompt) < PIECE and whole[: len(asked)] != asked:  # a token that reaches from one into the other
        place = len(prompt) - 1
    else:
        return ""
    shows, would = (marks.shown(said[place : place + SHOWN]) for said in (text, prompt))
    return f"training text has {shows!r} where a chat has {would!r}"
