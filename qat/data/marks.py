"""Marks of a chat template: where the template writes them they steer the model, where people write them they are text.

Without this a question about `<|im_end|>` would end the user's turn. transformers hides the marks in what was
said before a template is rendered, and takes what is hidden for text after that. Text is cut here as well, where it
is so long that a tokenizer, which needs some hundred bytes a token, would take more memory than the model.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from qat.data.conversations import Messages
from qat.data.reading import PIECE, check
from qat.data.tally import Unusable

LONGEST = 256  # characters of a mark
THINKING = ("<think>", "</think>")  # which an assistant may write, whatever the tokenizer calls them

# What the library puts around a mark that is text.
OPEN, _, CLOSE = mark_control_tokens("x", re.compile("x"))


def of(tokenizer: PreTrainedTokenizerBase) -> "Marks":
    """Those of a tokenizer and the template that it has now."""
    return _of(tokenizer, str(tokenizer.chat_template or ""))


def holds_hidden(text: str) -> bool:
    """Whether a text has marks in it that are text."""
    return OPEN in text and CLOSE in text


def shown(text: str) -> str:
    """A text as it was before its marks were hidden."""
    return text.replace(OPEN, "").replace(CLOSE, "")


class Marks:
    """The marks of one tokenizer and its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        known = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in known if token.special}
        written = {token.content for token in known if not token.content.isspace() and token.content in template}
        self._all = _any_of(special | written)
        self._whole = re.compile(f"{OPEN}?(?:{self._all.pattern}){CLOSE}?")
        # An assistant's thoughts and calls are in its words the same marks as in the template's.
        self._answers = _any_of(special.difference(THINKING))

    def hide(self, said: Any, role: str = "user") -> Any:
        """What somebody said, a text or an object of texts, its marks told apart from the template's."""
        marks = self._answers if role == "assistant" else self._all
        return mark_control_tokens(said, marks) if _holds(said, marks) else said

    def hidden(self, messages: Messages) -> Messages:
        """Messages with the marks in them told apart from the template's."""
        return [self.hide(message, message["role"]) for message in messages]

    def pieces(self, text: str) -> Iterator[str]:
        """A text in pieces of at most `PIECE` characters, cut between words where there are any, never in a mark."""
        begin = 0
        while len(text) - begin > PIECE:
            end = self._cut(text, begin + PIECE)
            yield text[begin:end]
            begin = end
        yield text[begin:]

    def tokens(self, piece: str) -> list[int]:
        """Token ids of a text, of which what is hidden is text and all else may be marks.

        Raises:
            Unusable: the tokenizer has no way to take a mark for text, or the text is damaged.
        """
        check(piece)
        if not holds_hidden(piece):
            return list(self._tokenizer(piece, add_special_tokens=False)["input_ids"])
        try:
            return list(encode_marked_chat(self._tokenizer, piece))
        except ValueError as error:
            raise Unusable("marks that this tokenizer cannot take for text", str(error), damaged=False) from None

    def _cut(self, text: str, end: int) -> int:
        space = max(text.rfind(sign, end - PIECE // 2, end) for sign in (" ", "\n"))
        end = space if space > 0 else end
        around = self._whole.finditer(text, end - LONGEST, end + LONGEST)
        return next((match.start() for match in around if match.start() < end < match.end()), end)


@lru_cache(maxsize=4)
def _of(tokenizer: PreTrainedTokenizerBase, template: str) -> Marks:
    return Marks(tokenizer, template)


def _any_of(marks: set[str]) -> re.Pattern[str]:
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _holds(said: Any, marks: re.Pattern[str]) -> bool:
    """Whether any text in an object has one of the marks."""
    if isinstance(said, str):
        return marks.search(said) is not None
    if isinstance(said, dict):
        return any(_holds(value, marks) for value in said.values())
    return isinstance(said, list) and any(_holds(value, marks) for value in said)
