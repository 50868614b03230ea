"""State, membership, watchers and metrics, each alone."""

import asyncio
import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from kvstore.errors import ConfigError, ResourceExhaustedError
from kvstore.master.cluster import Cluster
from kvstore.master.config import MasterConfig
from kvstore.master.membership import Membership, NodeLink, NodeState
from kvstore.master.state.base import KnownNode
from kvstore.master.state.lmdb import LmdbState
from kvstore.master.watch import BYTES_QUEUED_MAX, EVENTS_QUEUED_MAX, WATCHERS_MAX, Watchers
from kvstore_proto import master_pb2
from prometheus_client import generate_latest

from tests.master.rig import Master, keys

HELLO = master_pb2.NodeHello(protocol_version=1, node_id="a", hostname="host")


def test_state_survives_its_process(tmp_path: Path) -> None:
    state = LmdbState(tmp_path / "deep" / "state")
    assert (state.epoch, state.namespaces(), state.nodes()) == (0, [], [])
    assert state.raise_epoch() == 1
    assert state.raise_epoch(10) == 11
    report = master_pb2.NamespaceReport(root=b"r" * 32, tenant="default")
    state.put_namespace(report)
    node = KnownNode("a", "unix:/a", "host", "0.1.0")
    state.put_node(node)
    state.put_node(node)
    state.close()
    state = LmdbState(tmp_path / "deep" / "state")
    assert (state.epoch, state.namespaces(), state.nodes()) == (11, [report], [node])
    state.close()


def test_two_masters_never_share_a_directory(tmp_path: Path) -> None:
    first = LmdbState(tmp_path)
    with pytest.raises(ConfigError, match="in use by another kvstore-master"):
        LmdbState(tmp_path)
    first.close()
    LmdbState(tmp_path).close()


def test_a_directory_of_another_format_is_refused(tmp_path: Path) -> None:
    LmdbState(tmp_path).close()
    with lmdb.open(str(tmp_path / "state"), max_dbs=3) as env:
        table = env.open_db(b"meta")
        with env.begin(write=True, db=table) as txn:
            txn.put(b"format_version", (7).to_bytes(8, "little"))
    with pytest.raises(ConfigError, match="format version 7; this build reads 1"):
        LmdbState(tmp_path)


def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data_dir"):
        LmdbState(tmp_path / "file" / "state")
    (tmp_path / "broken" / "state").mkdir(parents=True)
    (tmp_path / "broken" / "state" / "data.mdb").write_bytes(b"junk" * 4096)
    with pytest.raises(ConfigError, match="cannot be opened"):
        LmdbState(tmp_path / "broken")


@contextlib.contextmanager
def no_write_succeeds() -> Iterator[None]:
    """As on a full disk: the system refuses every byte that this process writes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_master_on_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("kvstore.master.state.lmdb.MAP_BYTES", 2 * 4096)
        with pytest.raises(ConfigError, match=r"data_dir .* cannot be read and written.*space"):
            LmdbState(tmp_path)
    config = MasterConfig(data_dir=tmp_path)
    with contextlib.closing(LmdbState(tmp_path)) as state:
        with no_write_succeeds():
            with pytest.raises(ConfigError, match=r"data_dir .* cannot be written.*free space"):
                Cluster(config, state)
            with pytest.raises(ResourceExhaustedError, match="cannot be written"):
                state.raise_epoch(7)
        assert state.epoch == 0
        assert Cluster(config, state).epoch == 1


def test_I7_state_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.master.state.lmdb.NODES_MAX", 1)
    state = LmdbState(tmp_path)
    state.put_node(KnownNode("a", "", "", ""))
    with pytest.raises(ResourceExhaustedError, match="1 such entries"):
        state.put_node(KnownNode("b", "", "", ""))
    with pytest.raises(ResourceExhaustedError, match="cannot be written"):
        state.put_namespace(master_pb2.NamespaceReport(root=b"r" * 600))
    state.remove_node("a")
    state.remove_node("a")
    state.put_node(KnownNode("b", "", "", ""))
    state.close()


async def test_only_silence_that_the_master_could_hear_counts() -> None:
    members = Membership([], lost_after_s=2.0)
    link = NodeLink(HELLO, None)
    node = members.join(HELLO, link, 0.0)
    for now in (0.5, 1.0, 1.5, 2.0):
        assert members.overdue(now) == []
    # The master itself was stopped for a minute: reports may be waiting.
    assert members.overdue(62.0) == []
    assert node.last_seen == 62.0
    for now in (62.5, 63.0, 63.5, 64.0):
        assert members.overdue(now) == []
    assert members.overdue(64.5) == [link]


async def test_a_link_that_was_taken_over_leaves_nothing_behind() -> None:
    members = Membership([KnownNode("b", "", "", "")], lost_after_s=2.0)
    old, new = NodeLink(HELLO, None), NodeLink(HELLO, None)
    members.join(HELLO, old, 0.0)
    members.join(HELLO, new, 1.0)
    assert not members.leave(old)
    assert [n.known.node_id for n in members.in_state(NodeState.SYNCING)] == ["a"]
    assert members.leave(new)
    assert not members.leave(NodeLink(master_pb2.NodeHello(node_id="zz"), None))
    assert [n.known.node_id for n in members.in_state(NodeState.LOST)] == ["a", "b"]


async def test_I7_a_slow_watcher_is_cut_off_with_a_reason() -> None:
    watchers = Watchers()
    with watchers.subscribe(b"") as watcher:
        for _ in range(EVENTS_QUEUED_MAX + 2):
            watchers.publish(master_pb2.BlockEvents(root=b"r" * 32))
        for _ in range(EVENTS_QUEUED_MAX):
            await watcher.next()
        with pytest.raises(ResourceExhaustedError, match="watch again"):
            await asyncio.wait_for(watcher.next(), 1.0)


async def test_I7_a_slow_watcher_holds_a_bounded_number_of_bytes() -> None:
    watchers = Watchers()
    with watchers.subscribe(b"") as watcher:
        for _ in range(10):
            watchers.publish(master_pb2.BlockEvents(removed=bytes(16 << 20)))
        for _ in range((BYTES_QUEUED_MAX >> 24) - 1):  # a message has a little more than its keys
            await watcher.next()
        with pytest.raises(ResourceExhaustedError, match="64 MiB"):
            await watcher.next()
    with watchers.subscribe(b"") as watcher:
        for _ in range(3):
            watchers.publish(master_pb2.BlockEvents(removed=bytes(BYTES_QUEUED_MAX + 32)))
            assert (await watcher.next()).removed, "one message alone always fits"


async def test_I7_watchers_are_bounded() -> None:
    watchers = Watchers()
    with contextlib.ExitStack() as stack:
        for _ in range(WATCHERS_MAX):
            stack.enter_context(watchers.subscribe(b""))
        with pytest.raises(ResourceExhaustedError):
            stack.enter_context(watchers.subscribe(b""))
    assert len(watchers) == 0


@pytest.mark.parametrize(("field", "value"), [("heartbeat_ms", 1), ("index_keys_max", 0)], ids=str)
def test_a_setting_out_of_range_is_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        MasterConfig(**{field: value})  # type: ignore[arg-type]


async def test_metrics_name_nodes_and_blocks(master: Master) -> None:
    await master.ready_node(dram=keys(0, 1), ssd=keys(0))
    await master.found(keys(0, 1, 2))
    text = generate_latest(master.cluster.metrics.registry).decode()
    for line in (
        'kvstore_master_nodes{state="ready"} 1.0',
        'kvstore_master_blocks{node="node-a",tier="DRAM"} 2.0',
        'kvstore_master_blocks{node="node-a",tier="SSD"} 1.0',
        'kvstore_master_locate_ends_total{reason="never_stored"} 1.0',
        "kvstore_master_locate_found_total 2.0",
        "kvstore_master_locate_seconds_count 1.0",
        "kvstore_master_watchers 0.0",
    ):
        assert line in text.splitlines(), line


async def test_I9_a_master_stopped_before_its_first_check_holds_nothing_against_its_nodes() -> None:
    members = Membership([], lost_after_s=2.0)
    link = NodeLink(HELLO, None)
    members.join(HELLO, link, 0.0)
    assert members.overdue(60.0) == []
    assert members.overdue(60.5) == []
