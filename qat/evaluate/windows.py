"""A long text as overlapping windows, for perplexity as the literature has it.

The whole file is one sequence. Windows of `context` tokens begin every `stride` tokens; each scores only
the tokens that the one before did not reach, so a token is scored once, with at least `context - stride`
tokens before it (all but the first window's). This is the procedure of transformers' guide "Perplexity
of fixed-length models". With a stride as long as the context the windows are disjoint, as in the GPTQ
paper's tables, and the first token of each is not scored.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qat.artifacts import content_key
from qat.cache.batch import Batch
from qat.config import DataConfig, DataSource
from qat.data import files, marks
from qat.data.reading import check, lines
from qat.data.rows import rows
from qat.data.tally import Unusable
from qat.data.texts import TEXT
from qat.errors import ConfigError

AT_ONCE = 1 << 22  # characters given to the tokenizer at a time, for which it takes some hundred megabytes


class Windows:
    """Windows of token ids [T], read like the rows of a split; the last one may be padded behind."""

    def __init__(self, ids_T: Tensor, context: int, stride: int) -> None:
        """Nothing is copied before it is read."""
        self._ids, self.stride = ids_T, stride
        length = min(context, len(ids_T))
        self.rows = 1 + -(-(len(ids_T) - length) // stride)
        self.meta: dict[str, Any] = {"length": length}

    def __str__(self) -> str:
        """How the text is cut, in words."""
        size = f"{self.meta['length']} tokens"
        return f"windows of {size}, stride {self.stride}" if self.rows > 1 else f"one window of {size}"

    def batch(self, rows: Tensor) -> Batch:
        """The windows with these numbers [B]."""
        length, begin_B = self.meta["length"], rows * self.stride
        reached_B = torch.where(rows > 0, begin_B - self.stride + length, 0)  # end of the window before
        place_BL = begin_B[:, None] + torch.arange(length)
        next_BL = place_BL[:, 1:]
        mask = (next_BL >= reached_B[:, None]) & (next_BL < len(self._ids))
        ids = self._ids[place_BL.clamp_max(len(self._ids) - 1)]
        return Batch({"input_ids": ids, "loss_mask": mask.to(torch.uint8)}, 0, False)

    def text_key(self) -> str:
        """A key of the tokens and of how they are cut into windows."""
        read = [self.meta["length"], self.stride, hashlib.sha256(self._ids.numpy().tobytes()).hexdigest()]
        return content_key(read)

    def in_order(self, size: int) -> list[Tensor]:
        """All window numbers as batches of at most `size`."""
        return list(torch.arange(self.rows).split(size))


def read(path: str, tokenizer: PreTrainedTokenizerBase, tokens: int | None) -> Tensor:
    """Token ids [T] of a file, at most `tokens`: its text as it is, or that of its rows with blank lines between.

    Raises:
        MissingError: the file cannot be read.
        ConfigError: it is no text, or holds less than two tokens.
    """
    ids = torch.tensor(list(islice(_ids(path, tokenizer), tokens)), dtype=torch.long)
    if len(ids) < 2:
        raise ConfigError(f"evaluate.text={path}: no text to score")
    return ids


def _ids(path: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The tokens of a text, behind the begin marker if the tokenizer puts one there."""
    hiding = marks.of(tokenizer)
    yield from (token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id)
    for part in _parts(path):
        yield from hiding.tokens(hiding.hide(part))


def _parts(path: str) -> Iterator[str]:
    """A text whole, or in parts where it is longer than a tokenizer has the memory for."""
    held, size = [], 0
    for piece in _pieces(path):
        held.append(piece)
        size += len(piece)
        if size >= AT_ONCE:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)


def _pieces(path: str) -> Iterator[str]:
    """Lines, or the texts of rows with blank lines between."""
    (file,) = files.find(DataConfig(name="text", source=DataSource.text, path=path), TEXT.endings)
    if files.suffix(path) not in files.ROWS:
        for number, line in lines(file):
            yield _checked(line, file.place(f"line {number}"))
        return
    between = ""
    for place, row in rows(file):
        if isinstance(row, Unusable):
            raise ConfigError(f"evaluate.text={place}: {row.reason}")
        if row.get("text") is not None:
            yield between + _checked(str(row["text"]), place)
            between = "\n\n"


def _checked(text: str, place: str) -> str:
    try:
        check(text)
    except Unusable as unusable:
        raise ConfigError(f"evaluate.text={place}: {unusable.reason} ({unusable.detail})") from None
    return text
