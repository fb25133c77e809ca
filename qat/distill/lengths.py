"""Rows of several lengths in each step: a share of the rows is computed whole, others are cut into shorter ones.

A student that only ever sees short rows drifts from its teacher where texts grow long, and long rows alone are slow
and teach the beginnings of texts little. So the rows of a cache have the largest length, and `train.lengths` says
into pieces of how many tokens a step's rows are cut, `train.shares` how many of them. A piece is a row like those of
a shorter cache: it begins a document, or goes on with one of which it sees nothing. Of a step's rows those that the
fewest documents share are cut least, since their texts are long. That depends on the step alone, so a step is the
same whatever the machine and whenever it is made.
"""

from collections.abc import Sequence

from qat.errors import ConfigError


def pattern(lengths: Sequence[int], shares: Sequence[float], rows: int, whole: int) -> list[int]:
    """Tokens of the pieces of each row of a step, lengths spread evenly over the step.

    Args:
        lengths: tokens of a piece, that of whole rows among them; none takes all rows whole.
        shares: of rows, and so of tokens, for each length; none shares evenly.
        rows: of a step.
        whole: tokens of a row.

    Raises:
        ConfigError: a length does not divide rows, or gets none of them.
    """
    if not lengths:
        return [whole] * rows
    for length in lengths:
        if whole % length:
            raise ConfigError(f"train.lengths: sequences of {whole} tokens are no whole number of {length}")
    spread: list[tuple[float, int]] = []
    for length, count in zip(lengths, _counts(shares or [1.0] * len(lengths), rows), strict=True):
        if not count:
            raise ConfigError(f"train.lengths: the share of {length} is less than one of train.batch_size={rows} rows")
        spread += [((number + 0.5) / count, length) for number in range(count)]
    return [length for _, length in sorted(spread)]


def _counts(shares: Sequence[float], rows: int) -> list[int]:
    """Rows for each share, by largest remainders."""
    exact = [rows * share / sum(shares) for share in shares]
    counts = [int(number) for number in exact]
    remainders = sorted(range(len(shares)), key=lambda n: counts[n] - exact[n])
    for n in remainders[: rows - sum(counts)]:
        counts[n] += 1
    return counts
