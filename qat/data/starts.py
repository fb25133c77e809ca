"""Starts from which the teacher writes, each with the origin that decides its split."""

import random
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from qat.config import DataConfig, Start
from qat.data import sources, texts
from qat.data.asking import begun
from qat.data.tally import Tally
from qat.data.thinking import chat_tokens, user_turn
from qat.errors import QatError

Starts = list[tuple[str, list[int]]]

OPENING = (4, 32)  # fewest and most tokens of an opening
LOOKED_AT, LONG = 1000, 8  # prompts that are looked at for the longest one, and those of most characters among them


def starts(tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int) -> Starts:
    """Where text begins, for every start but `questions`, which are written first."""
    if data.start is Start.tokens:
        return _first_tokens(tokenizer, seed)[: data.documents]
    if data.start is Start.openings:
        return _openings(tokenizer, data, seed)
    return asked(tokenizer, data, texts.prompts(data)[: data.documents])


def asked(tokenizer: PreTrainedTokenizerBase, data: DataConfig, questions: list[str]) -> Starts:
    """Questions through the chat template, up to where the answer begins, in every thinking mode asked for."""
    modes = ["false", "true"] if data.thinking == "both" else [data.thinking]
    return [
        (question, chat_tokens(tokenizer, [{"role": "user", "content": question}], mode, ask=True))
        for question in questions
        for mode in modes
    ]


def longest(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> int:
    """Tokens of the longest prompt among the first ones of a source; 0 where there are none on this computer."""
    first = texts.some_prompts(data, min(data.documents or LOOKED_AT, LOOKED_AT))
    most = sorted(first, key=len)[-LONG:]
    try:
        return max((len(ids) for _, ids in asked(tokenizer, data, most)), default=0)
    except QatError:  # which whoever writes will raise
        return 0


def questions(tokenizer: PreTrainedTokenizerBase, replies: list[list[int]]) -> list[str]:
    """What the teacher wrote as a user, each once; what it did not bring to an end is left out."""
    _, end = user_turn(tokenizer)
    whole = [reply[:-1] for reply in replies if reply[-1] == end]
    texts = [str(text).strip() for text in tokenizer.batch_decode(whole, skip_special_tokens=True)]
    return list(dict.fromkeys(text for text in texts if text))


def _first_tokens(tokenizer: PreTrainedTokenizerBase, seed: int) -> Starts:
    """Every ordinary token once, in an order that the seed decides, behind the begin marker if there is one."""
    begin = begun(tokenizer, "")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(f"token {token}", [*begin, token]) for token in order if token not in special]


def _openings(tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int) -> Starts:
    """The first tokens of passages: a document is cut every `answer_tokens` tokens.

    Passages have their document's origin, which is what it has as text of its own.
    """
    tally = Tally.of(data)
    with closing(sources.plain(data, tokenizer, tally)) as documents:
        found = list(islice(_cut(documents, data.answer_tokens, random.Random(seed)), data.documents))
    tally.settle()
    return found


def _cut(documents: sources.Pairs, every: int, draw: random.Random) -> Iterator[tuple[str, list[int]]]:
    for origin, ids in documents:
        for first in range(0, len(ids), every):
            opening = ids[first : first + draw.randint(*OPENING)]
            if len(opening) >= OPENING[0]:
                yield origin, opening
