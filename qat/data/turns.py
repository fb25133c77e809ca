"""Turns: whether training text shows before each answer what a chat will show at that place.

A chat template is written for the next answer. Of answers that are there it may say something else: Qwen3's puts empty
thoughts before the last one alone, and drops what was thought earlier. A student that learns from the one is then
asked with the other. So the prompt that a chat would build is made for every answer of a conversation and compared,
token by token, with what comes before that answer in its rendering.
"""

from transformers import PreTrainedTokenizerBase

from qat.data import marks
from qat.data.reading import PIECE
from qat.data.tally import Turns, Unusable
from qat.data.thinking import Rendering, template

SHOWN = 40  # characters of either side that a message shows


def compared(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> Turns:
    """Looks at every answer of a rendering."""
    whole = marks.of(tokenizer).tokens(rendering.text[:PIECE])
    answers, examples = 0, list[str]()
    for number, message in enumerate(rendering.messages):
        if message["role"] != "assistant" or not number or rendering.messages[number - 1]["role"] == "assistant":
            continue
        answers += 1
        if example := _difference(tokenizer, rendering, number, whole):
            examples.append(example)
    return Turns(answers, len(examples), next(iter(examples), ""))


def _difference(tokenizer: PreTrainedTokenizerBase, rendering: Rendering, number: int, whole: list[int]) -> str:
    """What differs before the answer with this number; nothing where nothing does."""
    before = rendering.messages[:number]
    try:
        prompt = template(tokenizer, before, rendering.mode, rendering.tools, add_generation_prompt=True)
        asked = marks.of(tokenizer).tokens(prompt)
    except Unusable as refused:
        return f"a chat cannot ask that: {refused.reason}"
    if not rendering.text.startswith(prompt):
        pairs = enumerate(zip(rendering.text, prompt, strict=False))
        place = next((place for place, (a, b) in pairs if a != b), len(rendering.text))
    elif len(prompt) < PIECE and whole[: len(asked)] != asked:  # a token that reaches from one into the other
        place = len(prompt) - 1
    else:
        return ""
    shows, would = (marks.shown(text[place : place + SHOWN]) for text in (rendering.text, prompt))
    return f"training text has {shows!r} where a chat has {would!r}"
