"""Fixtures of the core's tests."""

from collections.abc import Iterator

import pytest

from tests.store.rig import Rig


@pytest.fixture
def dram() -> Iterator[Rig]:
    """16 blocks of DRAM, no SSD, session 1 open; what is left adds up."""
    rig = Rig(16)
    rig.open()
    yield rig
    rig.check()


@pytest.fixture
def tiers() -> Iterator[Rig]:
    """8 blocks of DRAM over 32 on SSD, session 1 open; what is left adds up."""
    rig = Rig(8, 32)
    rig.open()
    yield rig
    rig.check()
