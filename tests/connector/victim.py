"""Saves blocks through a node until it stands in the middle of a copy; then waits to be killed."""

import sys
import time
from typing import Any

import numpy as np
from kvstore_client import Write
from kvstore_connector.config import ConnectorConfig
from kvstore_connector.core import ConnectorCore
from kvstore_connector.store import node_connect

from tests.connector.rig import BLOCK_BYTES, SPEC, content


def stop_halfway(write: Write, index: int, data: Any) -> None:
    """Fills half of the slot, says so, and never ends."""
    write.array(index)[: BLOCK_BYTES // 2] = data[: BLOCK_BYTES // 2]
    print("halfway", flush=True)
    time.sleep(600)


def main(address: str, keys: list[bytes], whole: int) -> None:
    """Saves the first ``whole`` keys as they should be, and the others never to the end."""
    config = ConnectorConfig(address, connect_timeout_s=10.0)
    core = ConnectorCore(config, SPEC, node_connect(address, "victim", 10.0))
    rows = np.zeros((2 * len(keys), BLOCK_BYTES), np.uint8)
    for page, key in enumerate(keys):
        rows[page] = np.frombuffer(content(key), np.uint8)
    core.register_pages(rows)
    core.save(None, keys[:whole], list(range(whole)))
    while core.counters().get("connector_saved_blocks", 0) < whole:
        time.sleep(0.01)
    setattr(Write, "put", stop_halfway)  # noqa: B010
    core.save(keys[whole - 1], keys[whole:], list(range(whole, len(keys))))
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1], [bytes.fromhex(key) for key in sys.argv[3:]], int(sys.argv[2]))
