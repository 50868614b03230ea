"""A master in this process, and nodes that are only a stream."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.master.rig import Master, start_master


@pytest.fixture
async def master(tmp_path: Path) -> AsyncIterator[Master]:
    """A master with a heartbeat of 100 ms."""
    async with start_master(tmp_path / "master") as started:
        yield started


@pytest.fixture
def make_master(tmp_path: Path) -> Callable[..., object]:
    """Context managers of masters on one data directory, for those that restart."""

    def make(**options: object) -> object:
        return start_master(tmp_path / "master", **options)

    return make
