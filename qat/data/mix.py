"""Several sources as one, in the proportions of their weights."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qat.config import DataConfig, DataSource

Texts = Iterator[tuple[Any, ...]]  # origin, tokens, and perhaps where answers lie among these


def parts(data: DataConfig) -> list[DataConfig]:
    """The sources of a mixture, each with what the mixture says for all; a plain source is its only part."""
    if data.source is not DataSource.mix:
        return [data]
    own = ("source", "path", "repo", "revision", "start", "documents")
    unless_said = ("thinking", "answers", "answer_tokens", "greedy_tokens", "temperature")
    return [
        replace(
            data,
            parts=[],
            **{name: getattr(part, name) for name in own},
            **{name: getattr(part, name) for name in unless_said if getattr(part, name) is not None},
        )
        for part in data.parts
    ]


def interleave(streams: list[Texts], weights: list[float]) -> Texts:
    """Documents of all streams, so that their tokens so far stand in the proportion of the weights.

    It ends where the first stream does: going on would leave the proportion, and repeating text is
    training's business.
    """
    shares = [0.0] * len(streams)
    while True:
        behind = min(range(len(streams)), key=lambda number: shares[number])
        text = next(streams[behind], None)
        if text is None:
            return
        shares[behind] += len(text[1]) / weights[behind]
        yield text
