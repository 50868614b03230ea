"""kvstore-node as a process: its life, its restarts, and what it refuses to start with."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import lmdb
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvstore.node.daemon import main

from tests.node.rig import BLOCK_BYTES, SYNCED, TIMEOUT_S, Daemon, RawSession, keys_of

MakeDaemon = Callable[..., Daemon]


def pool_files(folder: Path) -> list[str]:
    """Names of what lies in the pool folders of all nodes."""
    return sorted(p.name for p in folder.glob("kvstore-*/*") if p.name != "lock")


async def test_I8_blocks_survive_kill_9(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon()
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    keys, volatile = keys_of(64, 1), keys_of(4, 2)
    assert await session.put(keys, level=SYNCED) == bytes([SYNCED] * 64)
    await session.reserve(volatile)
    node_id, instance, root = session.welcome.node_id, session.welcome.instance, session.root
    daemon.kill()
    assert len(pool_files(tmp_path)) == 2, "nobody cleaned up"
    await session.lose()

    daemon = make_daemon()
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    assert len(pool_files(tmp_path)) == 2, "the stale files are gone, the new ones are here"
    assert (session.welcome.node_id, session.root) == (node_id, root)
    assert session.welcome.instance != instance
    ssd = next(tier for tier in (await session.stats()).tiers if tier.tier == 3)
    assert (ssd.blocks, ssd.live_bytes) == (64, 64 * BLOCK_BYTES)
    assert (await session.check(keys)).granted == 64
    assert (await session.check(volatile)).granted == 0
    await session.goodbye()
    code, errors = daemon.stop()
    assert code == 0, errors
    assert pool_files(tmp_path) == []
    assert "Traceback" not in errors


async def test_I8_kill_9_in_the_middle_of_writes(make_daemon: MakeDaemon) -> None:
    keys = keys_of(96)
    acknowledged = 0
    for fault in ("ssd.data", "ssd.sync", "ssd.index", "ssd.indexed"):
        os.environ["KVSTORE_FAULTPOINTS"] = f"{fault}:kill@2"
        try:
            daemon = make_daemon()
        finally:
            del os.environ["KVSTORE_FAULTPOINTS"]
        daemon.wait_ready()
        session = await RawSession.open(daemon.address)
        with contextlib.suppress(grpc.aio.AioRpcError):
            while acknowledged < len(keys):
                part = keys[acknowledged : acknowledged + 8]
                await session.put(part, level=SYNCED)
                acknowledged += len(part)
        assert daemon.process.wait(TIMEOUT_S) == -signal.SIGKILL
        await session.lose()
    assert acknowledged >= 24
    daemon = make_daemon()
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    assert (await session.check(keys)).granted >= acknowledged
    await session.goodbye()


async def test_stop_tells_clients_and_is_quick(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("--log-level", "warning")
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    keys = keys_of(128)
    await session.put(keys)
    directory = session.directory()
    closed_before = directory.closed
    start = time.monotonic()
    code, errors = daemon.stop()
    assert (code, errors) == (0, "")
    assert time.monotonic() - start < 10
    assert (closed_before, directory.closed) == (False, True)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await session.receive(99)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    await session.lose()
    daemon = make_daemon()
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    assert (await session.check(keys)).granted == 128, "what was in memory was written first"
    await session.goodbye()


async def test_health_reflection_and_metrics(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon("--metrics-listen", "127.0.0.1:0", "--listen", "127.0.0.1:0")
    address = daemon.wait_ready().removeprefix("kvstore-node ready: ")
    session = await RawSession.open(address)
    await session.put(keys_of(3))
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="kvstore.v1.Node")
        response = await health.Check(request)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    assert daemon.process.stderr is not None
    line = next(line for line in daemon.process.stderr if "metrics on" in line)
    url = line.partition("metrics on ")[2].strip()
    text = (await asyncio.to_thread(urllib.request.urlopen, url)).read().decode()
    assert 'kvstore_node_space_bytes{state="capacity",tier="dram"} 4.194304e+06' in text
    assert 'kvstore_node_blocks{tier="dram"} 3.0' in text
    assert re.search(r"^kvstore_node_sessions 1\.0$", text, re.MULTILINE)
    await session.goodbye()
    assert daemon.stop()[0] == 0


@pytest.fixture
def _root_logger() -> Iterator[None]:
    """Puts the handlers back that a daemon in this process replaces."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def refusal(daemon: Daemon) -> str:
    """The one line with which a node refuses to start."""
    _, errors = daemon.process.communicate(timeout=TIMEOUT_S)
    assert daemon.process.returncode == 2, errors
    lines = [line for line in errors.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]
    assert len(lines) == 1, errors
    assert lines[0].startswith("kvstore-node: ")
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--dram", "1000TiB"], ["room", "GiB", "--dram"]),
        (["--ssd", "1000TiB"], ["room", "1000 TiB", "--ssd"]),
        (["--dram", "lots"], ["dram", "lots"]),
        (["--dram", "1KiB"], ["dram", "4KiB"]),
        (["--colour", "red"], ["--colour"]),
        (["--config", "/nonexistent.toml"], ["/nonexistent.toml"]),
        (["--listen", "0.0.0.0:0"], ["0.0.0.0", "--insecure"]),
        (["--listen", "nowhere"], ["nowhere", "unix:/run/kvstore/node.sock"]),
        (["--sessions-max", "abc"], ["'abc': not a whole number"]),
        (["--listen", "unix:/nonexistent/node.sock"], ["/nonexistent"]),
        (["--listen", "unix:/tmp/" + "x" * 120], ["longer than", "--listen unix:/run/"]),
        (["--pool-dir", "/nonexistent"], ["/nonexistent"]),
        (["--data-dir", "/proc/nothing"], ["/proc/nothing"]),
        (["--master", "nowhere"], ["nowhere"]),
        (["--log-level", "loud"], ["loud"]),
        (["--metrics-listen", "0.0.0.0:0"], ["--insecure"]),
    ],
    ids=lambda value: value[0].strip("-") if value and value[0].startswith("--") else "",
)
@pytest.mark.usefixtures("_root_logger")
def test_bad_start_is_one_line_and_exit_2(
    tmp_path: Path,
    flags: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--data-dir", str(tmp_path / "d"), "--pool-dir", str(tmp_path), "--dram", "1MiB"]
    with pytest.raises(SystemExit) as stop:
        main([*common, "--metrics-listen", "", "--log-level", "warning", *flags])
    assert stop.value.code == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1), line
    assert all(part in line for part in parts), line
    assert pool_files(tmp_path) == []


def test_unknown_key_in_the_file(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('dram = "4MiB"\nddram = 1\n')
    assert "'ddram'" in refusal(make_daemon("--config", str(tmp_path / "node.toml")))


def test_ports_in_use(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in refusal(make_daemon("--listen", address))
        assert address in refusal(make_daemon("--metrics-listen", address))
    make_daemon().wait_ready()
    line = refusal(make_daemon("--data-dir", str(tmp_path / "other")))
    assert "in use" in line
    assert "node.sock" in line


def test_one_node_a_directory(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    flags = ("--node-id", "same", "--listen", f"unix:{tmp_path}/other.sock")
    make_daemon("--node-id", "same").wait_ready()
    assert "in use by another node" in refusal(make_daemon(*flags))
    line = refusal(make_daemon(*flags, "--data-dir", str(tmp_path / "other")))
    assert f"kvstore-{os.getuid()}-same" in line
    other = ("--node-id", "other", "--data-dir", str(tmp_path / "other"))
    ssd = ("--ssd-dir", str(tmp_path / "data" / "ssd"))
    assert "in use by another node" in refusal(make_daemon(*flags, *other, *ssd))


def test_ssd_directory_of_another_node_or_format(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    first = make_daemon()
    first.wait_ready()
    assert first.stop()[0] == 0
    assert "node_id" in refusal(make_daemon("--node-id", "other"))
    env = lmdb.open(str(tmp_path / "data" / "ssd" / "index"), max_dbs=3)
    with env.begin(write=True, db=env.open_db(b"meta")) as txn:
        txn.put(b"format_version", b"0")
    env.close()
    assert "format version 0" in refusal(make_daemon())


def test_broken_node_id_file(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "node_id").write_bytes(b"\xff\xff")
    assert "node_id" in refusal(make_daemon())
    (tmp_path / "data" / "node_id").write_bytes(b"a/b")
    assert "node_id" in refusal(make_daemon())


def test_socket_of_a_dead_node_is_replaced_and_other_files_are_not(
    make_daemon: MakeDaemon, tmp_path: Path
) -> None:
    first = make_daemon()
    first.wait_ready()
    first.kill()
    assert (tmp_path / "node.sock").exists()
    second = make_daemon()
    second.wait_ready()
    assert (tmp_path / "node.sock").stat().st_mode & 0o777 == 0o600
    second.stop()
    (tmp_path / "node.sock").write_text("precious")
    assert "another kind" in refusal(make_daemon())
    assert (tmp_path / "node.sock").read_text() == "precious"


def test_help_names_every_setting() -> None:
    command = [sys.executable, "-m", "kvstore.node.daemon", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for name in ("--data-dir", "--dram", "--ssd", "--master", "--listen", "--quarantine-s"):
        assert name in done.stdout
