"""Text that already exists, as documents: conversations and plain text; streamed, never held whole."""

from collections.abc import Generator
from typing import Any

from transformers import PreTrainedTokenizerBase

from qat.config import DataConfig
from qat.data import conversations, marks, texts
from qat.data.passages import Passage
from qat.data.reading import PIECE
from qat.data.tally import Tally
from qat.data.thinking import renderings
from qat.data.turns import compared

Pairs = Generator[tuple[str, list[int]], None, None]

ORIGIN = 200  # characters at the start of a text that decide its split


def render(data: DataConfig, tokenizer: PreTrainedTokenizerBase, tally: Tally) -> Pairs:
    """Origin and tokens of every document of an existing text; what cannot be one is counted."""
    if data.source.plain:
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        yield from plain(data, tokenizer, tally, end)
        return
    hiding = marks.of(tokenizer)

    def made(row: dict[str, Any]) -> Pairs:
        said = conversations.conversation(row)
        rendered = renderings(tokenizer, said, data.thinking)
        tally.marked += any(marks.holds_hidden(one.text) for one in rendered)
        for one in rendered:
            tally.compare(compared(tokenizer, one))
        for piece in (piece for one in rendered for piece in hiding.pieces(one.text)):
            yield said.question[:PIECE], hiding.tokens(piece)

    yield from tally.usable(texts.found(data), made)


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
