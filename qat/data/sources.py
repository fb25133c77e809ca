"""Text that already exists, as documents: conversations and plain text; streamed, never held whole."""

from collections.abc import Collection, Generator
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat.config import DataConfig
from qat.data import conversations, marks, texts, turns
from qat.data.passages import Passage
from qat.data.reading import PIECE
from qat.data.tally import Tally, Unusable
from qat.data.thinking import Rendering, renderings

Pairs = Generator[tuple[str, list[int]], None, None]
Answered = Generator[tuple[str, list[int], turns.Spans], None, None]

ORIGIN = 200  # characters at the start of a text that decide its split


def render(data: DataConfig, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> Pairs:
    """Origin and tokens of every document of an existing text; what cannot be one is counted."""
    if data.source.plain:
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        yield from plain(data, tokenizer, tally, end)
        return
    hiding = marks.of(tokenizer)

    def made(row: dict[str, Any]) -> Pairs:
        said, rendered = _rendered(data, tokenizer, tally, row)
        for one in rendered:
            tally.compare(turns.told(turns.answers(tokenizer, one, hiding.tokens(one.text[:PIECE]))))
        for piece in (piece for one in rendered for piece in hiding.pieces(one.text)):
            yield said.question[:PIECE], hiding.tokens(piece)

    yield from tally.usable(texts.found(data), made)


def answered(data: DataConfig, tokenizer: PreTrainedTokenizerBase, tally: Tally, ends: Collection[int]) -> Answered:
    """Origin and tokens of conversations, and where in them answers lie that are as a chat would ask for them.

    An answer goes as far as the first of the tokens in `ends`.
    """
    hiding = marks.of(tokenizer)

    def made(row: dict[str, Any]) -> Answered:
        said, rendered = _rendered(data, tokenizer, tally, row)
        if any(len(one.text) > PIECE for one in rendered):
            raise Unusable(f"a conversation of more than {PIECE:,} characters", damaged=False)
        for one in rendered:
            whole = hiding.tokens(one.text)
            found = turns.answers(tokenizer, one, whole)
            tally.compare(turns.told(found))
            yield said.question[:PIECE], whole, turns.spans(tokenizer, one, found, whole, ends)

    yield from tally.usable(texts.found(data), made)


def _rendered(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, tally: Tally, row: dict[str, Any]
) -> tuple[conversations.Conversation, list[Rendering]]:
    said = conversations.conversation(row)
    rendered = renderings(tokenizer, said, data.thinking)
    tally.marked += any(marks.holds_hidden(one.text) for one in rendered)
    return said, rendered


def plain(data: DataConfig, tokenizer: PreTrainedTokenizerBase, tally: Tally, end: list[int] | None = None) -> Pairs:
    """Origin and tokens of every document of plain text; a text that is long is several, the last one with `end`."""
    hiding = marks.of(tokenizer)

    def made(found: dict[str, Any] | Passage) -> Pairs:
        passage = texts.passage(found)
        hidden = hiding.hide(passage.text)
        tally.marked += marks.holds_hidden(hidden)
        pieces = list(hiding.pieces(hidden))
        for number, piece in enumerate(pieces, 1):
            last = passage.ends and number == len(pieces)
            yield marks.shown(piece)[:ORIGIN], hiding.tokens(piece) + (end or [] if last else [])

    yield from tally.usable(texts.found(data), made)
