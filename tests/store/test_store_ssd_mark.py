"""The mark of an index: sequences never go back, and what is below its floor is gone."""

import numpy as np
import pytest
from kvstore.core.ssd_mark import Mark
from kvstore.core.ssd_record import NUMBER_MAX
from kvstore.errors import CorruptError


def test_a_mark_is_read_as_it_was_written() -> None:
    assert Mark.decode(Mark(7, 3).encode()) == Mark(7, 3)


def test_I1_a_mark_whose_bytes_changed_is_none() -> None:
    good = Mark(7, 3).encode()
    for place in range(len(good)):
        with pytest.raises(CorruptError, match="mark"):
            Mark.decode(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CorruptError, match="mark"):
            Mark.decode(good[:place])
    with pytest.raises(CorruptError, match="over"):
        Mark.decode(Mark(NUMBER_MAX + 1, 0).encode())


def test_commits_raise_it_and_an_empty_index_raises_its_floor() -> None:
    mark = Mark().after(9, empty=False)
    assert mark == Mark(9, 0)
    assert mark.after(0, empty=False) == mark
    assert mark.after(0, empty=True) == Mark(9, 10)
    assert mark.after(0, empty=True).after(12, empty=False) == Mark(12, 10)


@pytest.mark.parametrize(
    ("noted", "sequences", "mark"),
    [
        (Mark(), [], Mark(0, 1)),
        (Mark(), [5, 3, 8], Mark(9, 3)),  # of a version without marks
        (Mark(20, 4), [5, 3, 8], Mark(21, 3)),
        (Mark(20, 4), [25, 7], Mark(26, 7)),
        (Mark(20, 4), [], Mark(20, 21)),
    ],
)
def test_a_sound_index_says_what_is_left(noted: Mark, sequences: list[int], mark: Mark) -> None:
    assert noted.of(np.array(sequences, dtype=np.int64)) == mark


def test_I8_a_start_outranks_every_mark_that_was_noted_or_nearly() -> None:
    """The floor goes down where a version without marks wrote, or an emptying was not committed."""
    noted = Mark(20, 4)
    nearly = noted.after(0, empty=True)
    for before in (noted, nearly):
        assert before.of(np.array([5, 3])) > nearly
