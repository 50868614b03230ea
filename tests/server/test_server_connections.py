"""Connections that say nothing, or are too many: who holds them takes nobody else's place."""

import asyncio
import errno
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from unittest.mock import Mock

import httpx
import pytest
from kvstore.daemon import raise_file_limit
from kvstore_engine.server import bodies, http_server

from tests.server.harness import Server, server, until

HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
HANG = {"prompt": "abc", "cache_salt": "hang"}


@asynccontextmanager
async def connection(
    api: Server,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.base_url.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What comes before the server closes the connection."""
    async with asyncio.timeout(10):
        return await reader.read()


async def healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEALTH)
    async with asyncio.timeout(10):
        await reader.readuntil(b'{"status":"ok"}')


@pytest.mark.parametrize("first", [b"", b"GET /hea", HEALTH + b"GET"], ids=["", "part", "second"])
async def test_I7_a_head_that_does_not_come_in_time_ends_its_connection(
    first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.2)
    async with server() as api, connection(api) as (reader, writer):
        if first.endswith(b"GET"):
            await healthy(reader, writer)
            first = b"GET"
        writer.write(first)
        assert await ended(reader) == b""


async def test_I7_bytes_that_come_one_by_one_do_not_prolong_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.3)
    async with server() as api, connection(api) as (reader, writer):

        async def drip() -> None:
            writer.write(b"GET /health HTTP/1.1\r\nx: ")
            while True:
                writer.write(b"a")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        with suppress(ConnectionResetError):
            assert await ended(reader) == b""
        dripping.cancel()


async def test_I7_a_body_that_nobody_reads_has_a_limit_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "BODY_S", 0.2)
    monkeypatch.setattr(http_server, "ANSWER_S", 0.0)
    async with server() as api, connection(api) as (reader, writer):
        writer.write(b"POST /elsewhere HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        assert (await ended(reader)).startswith(b"HTTP/1.1 404")


async def test_the_limits_do_not_touch_an_answer_that_takes_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, name in ((http_server, "HEAD_S"), (http_server, "BODY_S"), (bodies, "BODY_S")):
        monkeypatch.setattr(module, name, 0.2)
    monkeypatch.setattr(http_server, "ANSWER_S", 0.0)
    async with server() as api:
        answer = await api.complete(prompt="abc", max_tokens=40, cache_salt="slow")
        assert answer["usage"]["completion_tokens"] == 40


async def test_I7_at_the_limit_the_connection_idle_for_longest_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 4)
    async with server() as api, AsyncExitStack() as stack:
        held = []
        for _ in range(4):
            held.append(await stack.enter_async_context(connection(api)))
            await healthy(*held[-1])
        await healthy(*held[0])
        fifth = await stack.enter_async_context(connection(api))
        await healthy(*fifth)
        assert await ended(held[1][0]) == b""
        for each in (held[0], held[2], held[3], fifth):
            await healthy(*each)


async def test_where_all_connections_wait_for_answers_one_more_is_a_503(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 3)
    async with server() as api:
        waiting = [asyncio.create_task(api.post("/v1/completions", **HANG)) for _ in range(3)]
        await until(lambda: api.engine.open_requests == 3)
        async with connection(api) as (reader, _):
            said = await ended(reader)
        assert said.startswith(b"HTTP/1.1 503")
        assert b"too many connections" in said
        for task in waiting:
            task.cancel()
        await until(lambda: not api.engine.open_requests)
        assert (await api.client.get("/health")).status_code == 200


async def test_I7_others_have_their_turn_while_many_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_MAX", 1)
    turns, at_refusal = 0, []
    refuse = http_server._refuse

    def refused(accepted: socket.socket) -> None:
        at_refusal.append(turns)
        refuse(accepted)

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(http_server, "_refuse", refused)
    async with server() as api:
        waiting = asyncio.create_task(api.post("/v1/completions", **HANG))
        await until(lambda: api.engine.open_requests == 1)
        ticker = asyncio.create_task(take_turns())
        address = ("127.0.0.1", api.client.base_url.port or 0)
        flood = [socket.create_connection(address) for _ in range(40)]  # none is accepted meanwhile
        await until(lambda: len(at_refusal) == len(flood))
        assert len(set(at_refusal)) == len(flood)
        for each in flood:
            each.close()
        ticker.cancel()
        waiting.cancel()


@pytest.mark.parametrize("left", [0, 1])
def test_a_connection_whose_answer_is_on_its_way_is_not_idle(left: int) -> None:
    connection = http_server.Connection.__new__(http_server.Connection)
    connection.cycle = None  # type: ignore[assignment]
    connection.transport = Mock(get_write_buffer_size=lambda: left)
    assert connection.idle == (not left)


async def test_I7_without_open_files_it_says_so_once_and_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    accept, failed = loop.sock_accept, 0

    async def scarce(listener: socket.socket) -> tuple[socket.socket, object]:
        nonlocal failed
        if failed < 20:
            failed += 1
            raise OSError(errno.EMFILE, "Too many open files")
        accepted: tuple[socket.socket, object] = await accept(listener)
        return accepted

    monkeypatch.setattr(http_server, "ACCEPT_RETRY_S", 0.01)
    monkeypatch.setattr(loop, "sock_accept", scarce)
    async with server() as api:
        assert (await api.client.get("/health")).status_code == 200
    assert failed == 20
    lines = [r.getMessage() for r in caplog.records if r.name == http_server.__name__]
    assert lines == ["cannot accept connections for now: Too many open files"]
    assert "Traceback" not in caplog.text


def test_I7_idle_connections_beyond_the_limit_of_files_keep_nobody_out() -> None:
    command = [sys.executable, "-m", "kvstore_engine.server.main", "--model", "tiny-random"]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 256)),
    )
    idle: list[socket.socket] = []
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        port = int(url.rpartition(":")[2])
        while len(idle) < 300:
            idle.append(socket.create_connection(("127.0.0.1", port), timeout=30))
        for _ in range(3):
            assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        process.terminate()
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
        for each in idle:
            each.close()
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "cannot accept" not in err


def test_the_limit_of_files_is_raised_as_far_as_it_goes() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
