"""Figures as people read them."""

import pytest
from kvstore.cli.output import bar, count, duration, size, tier_name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 << 30, "3 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_size(value: int, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (75, "1 min 15 s"), (7500, "2 h 5 min"), (90_000, "1 d 1 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_count() -> None:
    assert [count(n, "block") for n in (0, 1, 1234)] == ["0 blocks", "1 block", "1,234 blocks"]


@pytest.mark.parametrize(
    ("parts", "total", "picture"),
    [
        ([(0, "")], 10, "░░░░░"),
        ([(1, "")], 1000, "█░░░░"),
        ([(5, ""), (5, "")], 10, "█████"),
        ([(10, ""), (1, "")], 10, "█████"),
        ([(1, "")], 0, "░░░░░"),
    ],
)
def test_bar(parts: list[tuple[int, str]], total: int, picture: str) -> None:
    assert bar(parts, total, cells=5).plain == picture


def test_a_tier_of_another_build_is_shown_as_its_number() -> None:
    assert (tier_name(2), tier_name(77)) == ("DRAM", "77")
