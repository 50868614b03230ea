"""`kvstore up` and the commands on it, with the real daemons and a real client."""

import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from kvstore_client import AckLevel

from tests.cli.store import BLOCK_BYTES, Store, running, short_directory, until

TOKENS = list(range(26))
TEXT = ",".join(map(str, TOKENS))
BLOCKS = 6


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def put_prompt(store: Store) -> list[bytes]:
    """Stores the full blocks of TOKENS, acknowledged as synced."""
    data = np.arange(BLOCKS * BLOCK_BYTES, dtype=np.uint32).astype(np.uint8)
    with store.namespace() as ns:
        keys = ns.keys(TOKENS)
        ns.put(keys, data, level=AckLevel.SYNCED)
    return list(keys)


def located(store: Store) -> list[tuple[str, int, int]]:
    runs = store.json("locate", "--tokens", TEXT)["runs"]
    return [(run["tier"], run["first"], run["count"]) for run in runs]


def test_commands_on_a_real_store() -> None:
    with short_directory() as data_dir, running(data_dir) as store:
        assert '"kv_connector":"KVStoreConnector"' in store.endpoints["kv_transfer_config"]
        keys = put_prompt(store)
        until(lambda: store.json("status")["indexed_blocks"] == 2 * BLOCKS)
        until(lambda: [t["blocks"] for t in store.json("status")["tiers"]] == [BLOCKS, BLOCKS])
        [namespace] = store.json("status")["namespaces"]
        assert (namespace["spec"]["model"], namespace["blocks"]) == ("tests", BLOCKS)
        [node] = store.json("nodes")["nodes"]
        assert (node["state"], node["address"]) == ("ready", store.endpoints["node"])
        listed = store.json("blocks", "--tier", "ssd")["blocks"]
        assert [b["key"] for b in listed] == sorted(key.hex() for key in keys)
        assert located(store) == [("DRAM", 0, BLOCKS), ("SSD", 0, BLOCKS)]

        evicted = store.json("evict", "--tier", "dram", "--bytes", str(2 * BLOCK_BYTES))
        assert evicted["blocks"] == 2
        until(lambda: located(store)[0] == ("DRAM", 0, BLOCKS - 2))
        store.cli("evict", "--tier", "dram")
        until(lambda: located(store) == [("SSD", 0, BLOCKS)])
        assert store.json("purge", "--all", "--yes")["errors"] == []
        until(lambda: located(store) == [])
        until(lambda: store.json("status")["tiers"][1]["live_bytes"] == 0)


def test_I3_what_is_on_ssd_is_found_after_everything_was_killed() -> None:
    with short_directory() as data_dir:
        with running(data_dir) as store:
            put_prompt(store)
            epoch = store.json("status")["cluster_epoch"]
            os.killpg(store.process.pid, signal.SIGKILL)
        with running(data_dir) as store:
            assert located(store) == [("SSD", 0, BLOCKS)]
            assert store.json("status")["cluster_epoch"] > epoch
            out = np.zeros(BLOCKS * BLOCK_BYTES, dtype=np.uint8)
            with store.namespace() as ns:
                assert ns.get(ns.keys(TOKENS), out, timeout_s=10).count == BLOCKS
            expected = np.arange(BLOCKS * BLOCK_BYTES, dtype=np.uint32).astype(np.uint8)
            assert np.array_equal(out, expected)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_stops_both_daemons(signum: signal.Signals) -> None:
    with short_directory() as data_dir, running(data_dir) as store:
        children = store.children()
        assert set(children) == {"master", "node"}
        assert store.end(signum) == 0
        assert not any(map(alive, children.values()))
        assert not list(data_dir.rglob("pool-*"))


@pytest.mark.parametrize("name", ["master", "node"])
def test_when_one_daemon_dies_the_other_is_stopped(name: str) -> None:
    with short_directory() as data_dir, running(data_dir) as store:
        children = store.children()
        os.kill(children[name], signal.SIGKILL)
        assert store.process.wait(20) == 1
        assert f"kvstore: kvstore-{name} was killed by signal 9" in store.error()
        assert not any(map(alive, children.values()))


def test_no_daemon_outlives_a_killed_up() -> None:
    with short_directory() as data_dir, running(data_dir) as store:
        children = store.children()
        store.end(signal.SIGKILL)
        until(lambda: not any(map(alive, children.values())))


def test_a_port_in_use_is_wrong_usage() -> None:
    with short_directory() as data_dir, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        store = Store(data_dir, "--master-listen", address)
        try:
            assert store.process.wait(20) == 2
            error = store.error()
            assert f"kvstore: cannot listen on {address}: Address already in use; " in error
            assert "take another --master-listen" in error
            assert "Traceback" not in error
        finally:
            store.clean_up()


def test_a_node_that_cannot_start_takes_the_master_down() -> None:
    with short_directory() as data_dir:
        store = Store(data_dir, "--dram", "900TiB")
        try:
            assert store.process.wait(20) == 2
            error = store.error()
            assert "kvstore-node: " in error
            assert "Traceback" not in error
        finally:
            store.clean_up()


def test_a_blank_in_the_data_directory() -> None:
    with short_directory() as parent, running(parent / "a b") as store:
        assert store.endpoints["node"] == f"unix:{parent}/a b/node.sock"
        put_prompt(store)
