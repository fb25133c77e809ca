"""Rows of a text that cannot be used: a few are left out, counted and reported; many end the run.

Text as people have it holds a broken line here and an empty answer there. To stop at each would be
tiresome, to pass over them without a word would be wrong.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qat.config import DataConfig
from qat.errors import ConfigError

log = logging.getLogger(__name__)

FEW, SHARE = 5, 0.01  # damaged rows that are left out, as a number or a share of all rows; above both the run ends
EARLY = 1000  # damaged rows between two checks, so that a bad file is refused before its end
SHOWN, LONGEST = 4, 160  # reasons listed in a message, and characters shown of a detail

T = TypeVar("T")


class Unusable(Exception):
    """A row of which no document can be made.

    Attributes:
        reason: what it is or has, in the words that all such rows share.
        detail: what only this one has.
        remedy: what can be done about a file of such rows.
        damaged: False for a good row that there is nothing to learn from.
    """

    def __init__(self, reason: str, detail: str = "", remedy: str = "", damaged: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.remedy, self.damaged = reason, detail, remedy, damaged


@dataclass(frozen=True)
class Turns:
    """How answers begin in training text, and in a chat.

    Attributes:
        answers: those that follow what a user or a tool said.
        differing: those of them that follow other tokens than they would in a chat.
        example: what both show from where one of these differs.
    """

    answers: int = 0
    differing: int = 0
    example: str = ""


@dataclass
class _LeftOut:
    """Rows that are left out for one reason, and where the first is."""

    place: str
    first: Unusable
    count: int = 0

    def __str__(self) -> str:
        where = f"the first at {self.place}" if self.count > 1 else self.place
        return f"{self.first.reason}: {self.count:,}, {where}{self.first.detail and f', {self.first.detail[:LONGEST]}'}"


@dataclass
class Tally:
    """How many rows of a source were read, and which of them were left out.

    Attributes:
        source: what the user calls it.
        rows: read so far, those left out among them.
        ended: there are no more.
        marked: those with marks of the chat template in their text.
        left_out: by reason.
        turns: answers, and those that follow other tokens than in a chat.
    """

    source: str
    rows: int = 0
    ended: bool = False
    marked: int = 0
    left_out: dict[str, _LeftOut] = field(default_factory=dict)
    turns: Turns = Turns()

    @classmethod
    def of(cls, data: DataConfig) -> "Tally":
        """Of the files or the hub data set of a source."""
        return cls(f"data.path={data.path}" if data.path else f"data.repo={data.repo}")

    def usable(self, rows: Iterable[tuple[str, Any]], make: Callable[[Any], Iterable[T]]) -> Iterator[T]:
        """All that is made of each row.

        Args:
            rows: with the place of each; one that could not even be read is an `Unusable`.
            make: raises `Unusable` where nothing can be made of a row.

        Raises:
            ConfigError: so many are damaged that this is another kind of file.
        """
        for place, row in rows:
            self.rows += 1
            try:
                if isinstance(row, Unusable):
                    raise row
                yield from make(row)
            except Unusable as unusable:
                self._leave_out(place, unusable)
        self.ended = True

    def compare(self, found: Turns) -> None:
        """Adds the answers of a conversation; the first example stays."""
        known = self.turns
        example = known.example or found.example
        self.turns = Turns(known.answers + found.answers, known.differing + found.differing, example)

    def settle(self) -> None:
        """Tells what was left out, and how many answers a chat would ask for otherwise, in a line each.

        Raises:
            ConfigError: as `check`.
        """
        self.check()
        left, rows = self._left(), f"{self.rows:,}"
        if left:
            log.warning("%s: left out %s of %s rows%s", self.source, f"{left:,}", rows, self._why())
        if self.marked:
            said = "%s: %s of %s rows have marks of the chat template in their text, where they are read as text"
            log.info(said, self.source, f"{self.marked:,}", rows)

        if self.turns.differing:
            count, answers = f"{self.turns.differing:,}", f"{self.turns.answers:,}"
            said = "%s: %s of %s answers follow other tokens than they would in a chat: %s"
            log.warning(said, self.source, count, answers, self.turns.example)

    def check(self) -> None:
        """Looks at what was read so far.

        Raises:
            ConfigError: more than a few rows are damaged, or nothing is left.
        """
        damaged = self._left(damaged=True)
        if damaged > max(FEW, SHARE * self.rows):
            said = f"{damaged:,} of {self.rows:,} rows cannot be read, which is more than a few"
            raise ConfigError(f"{self.source}: {said}{self._why(damaged=True)}")
        if self.ended and self._left() == self.rows:
            said = f"none of its {self.rows:,} rows can be used" if self.rows else "there is no text in it"
            raise ConfigError(f"{self.source}: {said}{self._why()}")

    def counts(self) -> dict[str, int]:
        """Rows left out by reason."""
        return {reason: one.count for reason, one in self.left_out.items()}

    def _leave_out(self, place: str, unusable: Unusable) -> None:
        one = self.left_out.setdefault(unusable.reason, _LeftOut(place, unusable))
        one.count += 1
        if unusable.damaged and self._left(damaged=True) % EARLY == 0:
            self.check()

    def _left(self, damaged: bool = False) -> int:
        return sum(one.count for one in self.left_out.values() if one.first.damaged or not damaged)

    def _why(self, damaged: bool = False) -> str:
        """The reasons, the most frequent first, and what to do about that."""
        chosen = [one for one in self.left_out.values() if one.first.damaged or not damaged]
        if not chosen:
            return ""
        ranked = sorted(chosen, key=lambda one: -one.count)
        more = f"; {len(ranked) - SHOWN} more reasons" if len(ranked) > SHOWN else ""
        remedy = next((f": {one.first.remedy}" for one in ranked if one.first.remedy), "")
        return f" ({'; '.join(map(str, ranked[:SHOWN]))}{more}){remedy}"
