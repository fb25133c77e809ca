"""What is left out of a text, and from when on the text is refused."""

import pytest

from qat.data.tally import EARLY, Tally, Unusable
from qat.errors import ConfigError


def rows(good, damaged=0, empty=0):
    """Some rows, the damaged ones first."""
    bad = [Unusable("damage", f"byte {n}", "mend it") for n in range(damaged)]
    return [(f"a line {n}", row) for n, row in enumerate([*bad, *[None] * empty, *range(good)], 1)]


def make(row):
    if row is None:
        raise Unusable("nothing said", damaged=False)
    return [row, -row]


def taken(tally, *counts):
    return list(tally.usable(rows(*counts), make))


def test_everything_that_can_be_used_comes_in_order():
    tally = Tally("data.path=a")
    assert taken(tally, 2, 1, 1) == [0, 0, 1, -1]
    assert tally.rows == 4 and tally.counts() == {"damage": 1, "nothing said": 1}


def test_what_is_left_out_is_told_in_a_line(caplog):
    tally = Tally("data.path=a")
    taken(tally, 1000, 1, 2)
    tally.settle()
    assert caplog.messages == [
        "data.path=a: left out 3 of 1,003 rows"
        " (nothing said: 2, the first at a line 2; damage: 1, a line 1, byte 0): mend it"
    ]


def test_nothing_is_said_of_a_text_without_fault(caplog):
    tally = Tally("a")
    taken(tally, 3)
    tally.settle()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("good", "damaged", "refused"),
    [(0, 1, True), (1, 5, False), (1, 6, True), (593, 6, True), (594, 6, False), (2000, 20, False), (1900, 20, True)],
)
def test_more_than_a_few_damaged_rows_are_another_kind_of_file(good, damaged, refused):
    """A few are five, or one in a hundred."""
    tally = Tally("data.path=a")
    taken(tally, good, damaged)
    if not refused:
        return tally.settle()
    with pytest.raises(ConfigError, match=rf"data\.path=a: .*damage: {damaged}, .*a line 1, byte 0\): mend it"):
        tally.settle()


def test_rows_with_nothing_to_learn_from_are_no_damage():
    tally = Tally("a")
    taken(tally, 1, 0, 100)
    tally.settle()


@pytest.mark.parametrize(("empty", "said"), [(3, r"none of its 3 rows can be used \(nothing"), (0, "no text in it")])
def test_a_text_of_which_nothing_is_left_is_refused(empty, said):
    tally = Tally("a")
    assert taken(tally, 0, 0, empty) == []
    with pytest.raises(ConfigError, match=said):
        tally.settle()


def test_a_text_that_was_not_read_to_its_end_is_not_judged_by_what_was():
    tally = Tally("a")
    found = tally.usable(rows(3, 0, 1), make)
    next(found)
    found.close()
    tally.settle()
    assert tally.rows == 2


def test_nobody_waits_for_the_end_of_a_file_that_is_none():
    def endless():
        yield from rows(0, EARLY)
        raise AssertionError("still read")

    with pytest.raises(ConfigError, match="1,000 of 1,000 rows cannot be read"):
        list(Tally("a").usable(endless(), make))


def test_only_the_most_frequent_reasons_are_named():
    tally = Tally("a")
    list(tally.usable([(str(n), Unusable(f"reason {n % 10}")) for n in range(75)], make))
    with pytest.raises(ConfigError, match=r"\(reason 0: 8, .*reason 3: 8, the first at 3; 6 more reasons\)$"):
        tally.settle()
