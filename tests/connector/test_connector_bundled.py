"""The adapter for kvstore's own engine."""

from collections.abc import Iterator

import pytest
import torch
from kvstore.errors import ConfigError, InvalidArgumentError
from kvstore_connector.bundled import KVStoreConnector, create_connector
from kvstore_connector.config import ConnectorConfig
from kvstore_engine.kv_transfer import KVConnector, SaveBlock, TransferEvents

from tests.connector.fake_store import FakeStore
from tests.connector.rig import SPEC, Rig, wait_until


@pytest.fixture
def connector() -> Iterator[KVStoreConnector]:
    connector = KVStoreConnector(ConnectorConfig("unix:/fake"), SPEC, FakeStore().connect)
    yield connector
    connector.close()


def wait_for(connector: KVConnector, *, pages: int = 0, loads: int = 0) -> TransferEvents:
    events = TransferEvents()

    def enough() -> bool:
        more = connector.poll()
        events.loads += more.loads
        events.saved_pages += more.saved_pages
        return len(events.loads) >= loads and len(events.saved_pages) >= pages

    wait_until(enough)
    return events


def test_pages_travel_through_the_seam(connector: KVStoreConnector) -> None:
    seam: KVConnector = connector
    pages = torch.arange(16 * 128, dtype=torch.float32).reshape(16, 2, 1, 2, 4, 8)
    seam.register_pages(pages)
    keys = Rig.chain(seam.root, 3)
    seam.on_request("a", keys)
    seam.save("a", None, [SaveBlock(key, page) for page, key in enumerate(keys)])
    seam.hurry_saves()
    assert wait_for(seam, pages=3).saved_pages == [0, 1, 2]
    wait_until(lambda: (found := seam.match("a", 0)) is not None and found.blocks == 3)
    seam.start_load("a", 0, [5, 6, 7])
    (result,) = wait_for(seam, loads=1).loads
    assert (result.request_id, result.blocks, result.end_reason) == ("a", 3, "complete")
    assert result.tokens_by_tier == {"dram": 12}
    assert torch.equal(pages[5:8], pages[:3])
    seam.pages_changed(keys, [])
    seam.request_finished("a")
    assert seam.counters()["connector_saved_blocks"] == 3
    assert connector.connected


def test_pages_elsewhere_are_refused(connector: KVStoreConnector) -> None:
    with pytest.raises(InvalidArgumentError, match="contiguous CPU"):
        connector.register_pages(torch.zeros(4, 128).t())


def test_the_factory_checks_its_config_and_goes_on_without_a_node() -> None:
    with pytest.raises(ConfigError, match="node"):
        create_connector({"kv_role": "kv_both"}, SPEC, "engine")
    table = {"kv_connector_extra_config": {"node": "unix:/nowhere/node.sock"}}
    connector = create_connector(table, SPEC, "engine")
    try:
        assert not connector.connected
        connector.on_request("a", [bytes(32)])
        found = connector.match("a", 0)
        assert found is not None
        assert (found.blocks, found.end_reason) == (0, "store_unavailable")
    finally:
        connector.close()
