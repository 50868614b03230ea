"""A client of a fake node in the same process, or of a real one in its own."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from kvstore_client import AsyncClient, CacheSpec, Namespace

from tests.client.fake_node import FakeNode
from tests.node.rig import Daemon

BLOCK_BYTES = 8192


@pytest.fixture
def spec() -> CacheSpec:
    return CacheSpec.raw("test", block_bytes=BLOCK_BYTES, block_tokens=4)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[FakeNode]:
    fake = FakeNode(tmp_path)
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def client(node: FakeNode) -> AsyncIterator[AsyncClient]:
    connected = await AsyncClient.connect(node.address, name="test", timeout_s=2)
    yield connected
    await connected.close()


@pytest.fixture
async def ns(client: AsyncClient, spec: CacheSpec) -> Namespace:
    return await client.open_namespace(spec)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A kvstore-node process with 4 MiB of DRAM and 16 MiB of SSD."""
    started = Daemon(tmp_path)
    started.wait_ready()
    yield started
    started.kill()
