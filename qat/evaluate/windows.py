"""A long text as overlapping windows, for perplexity as the literature has it.

The whole file is one sequence. Windows of `context` tokens begin every `stride` tokens; each scores only
the tokens that the one before did not reach, so a token is scored once, with at least `context - stride`
tokens before it (all but the first window's). This is the procedure of transformers' guide "Perplexity
of fixed-length models". With a stride as long as the context the windows are disjoint, as in the GPTQ
paper's tables, and the first token of each is not scored.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qat.artifacts import content_key
from qat.cache.reader import Batch
from qat.config import DataConfig, DataSource
from qat.data import files
from qat.errors import ConfigError

ROWS = (".json", ".jsonl", ".parquet")


class Windows:
    """Windows of token ids [T], read like the rows of a split; the last one may be padded behind."""

    def __init__(self, ids_T: Tensor, context: int, stride: int) -> None:
        """Nothing is copied before it is read."""
        self._ids, self._stride = ids_T, stride
        length = min(context, len(ids_T))
        self.rows = 1 + -(-(len(ids_T) - length) // stride)
        self.meta: dict[str, Any] = {"length": length}

    def batch(self, rows: Tensor) -> Batch:
        """The windows with these numbers [B]."""
        length, begin_B = self.meta["length"], rows * self._stride
        reached_B = torch.where(rows > 0, begin_B - self._stride + length, 0)  # by the window before
        place_BL = begin_B[:, None] + torch.arange(length)
        next_BL = place_BL[:, 1:]
        mask = (next_BL >= reached_B[:, None]) & (next_BL < len(self._ids))
        ids = self._ids[place_BL.clamp_max(len(self._ids) - 1)]
        return Batch({"input_ids": ids, "loss_mask": mask.to(torch.uint8)}, 0, False)

    def text_key(self) -> str:
        """A key of the tokens and of how they are cut into windows."""
        read = [self.meta["length"], self._stride, hashlib.sha256(self._ids.numpy().tobytes()).hexdigest()]
        return content_key(read)

    def in_order(self, size: int) -> list[Tensor]:
        """All window numbers as batches of at most `size`."""
        return list(torch.arange(self.rows).split(size))


def read(path: str, tokenizer: PreTrainedTokenizerBase, tokens: int | None) -> Tensor:
    """Token ids [T] of a file, at most `tokens`: its text as it is, or that of its rows with blank lines between.

    Raises:
        MissingError: the file cannot be read as UTF-8 text.
        ConfigError: it holds less than two tokens.
    """
    ids = tokenizer(_text(path))["input_ids"][:tokens]
    if len(ids) < 2:
        raise ConfigError(f"evaluate.text={path}: no text to score")
    return torch.tensor(ids)


def _text(path: str) -> str:
    (file,) = files.find(DataConfig(name="text", source=DataSource.text, path=path))
    if not path.endswith(ROWS):
        return "".join(files.lines(file))
    return "\n\n".join(str(row["text"]) for row in files.rows(file) if row.get("text") is not None)
