"""Real nodes: in this process, and as daemons of their own."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.node.rig import Daemon, LocalNode


@pytest.fixture
async def make_node(tmp_path: Path) -> AsyncIterator[Callable[..., LocalNode]]:
    """Makes nodes in this process and closes them at the end."""
    nodes: list[LocalNode] = []

    def make(**settings: object) -> LocalNode:
        nodes.append(LocalNode(tmp_path, **settings))
        return nodes[-1]

    yield make
    for node in nodes:
        await node.stop()


@pytest.fixture
async def node(make_node: Callable[..., LocalNode]) -> LocalNode:
    """A node with both tiers."""
    node = make_node()
    await node.start()
    return node


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts kvstore-node processes and ends them at the end."""
    daemons: list[Daemon] = []

    def make(*flags: str) -> Daemon:
        daemons.append(Daemon(tmp_path, *flags))
        return daemons[-1]

    yield make
    for daemon in daemons:
        daemon.kill()
