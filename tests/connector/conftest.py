"""A connector over a fake store, and what its tests share."""

from collections.abc import Callable, Iterator

import pytest

from tests.connector.rig import Rig


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """Builds connectors and closes them at the end."""
    rigs: list[Rig] = []

    def make(**options: object) -> Rig:
        rigs.append(Rig(**options))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.core.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    """A connector with default settings."""
    return make_rig()
