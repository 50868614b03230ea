"""A master with one fake node, for commands to look at."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.master.rig import Master, start_master


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that do not wrap, whatever runs the tests."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
async def master(tmp_path: Path) -> AsyncIterator[Master]:
    """A master on a port of its own."""
    async with start_master(tmp_path / "master") as started:
        yield started
