"""Bodies that never end: how long they are waited for, and how much of them is kept."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from kvstore_engine.server import bodies, serving

from tests.server.harness import Server, server, until

LENGTH = 1 << 20


@asynccontextmanager
async def unfinished(api: Server, sent: int) -> AsyncIterator[asyncio.StreamReader]:
    """A request of LENGTH bytes, of which ``sent`` are sent; what the server says to it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.client.base_url.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {LENGTH}\r\n\r\n"
    writer.write(head.encode() + b" " * sent)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        return await reader.read(4096)


async def test_I7_a_body_that_does_not_come_in_time_is_a_408(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.2)
    async with server() as api, unfinished(api, 100_000) as reader:
        said = await answer(reader)
        assert said.startswith(b"HTTP/1.1 408")
        assert b"the body did not come within" in said
        assert api.service.bodies.held == 0


async def test_I7_all_unfinished_bodies_together_have_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "BODIES_BYTES_MAX", 700_000)
    large = 300_000 + bodies.UNCOUNTED_BYTES
    async with server() as api, AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(unfinished(api, large))
        await until(lambda: api.service.bodies.held == 600_000)
        for _ in range(50):
            await stack.enter_async_context(unfinished(api, bodies.UNCOUNTED_BYTES))
        third = await stack.enter_async_context(unfinished(api, large))
        said = await answer(third)
        assert said.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in said
        assert b"too many large requests" in said
        assert api.service.bodies.held == 600_000
        assert (await api.complete(prompt="small", max_tokens=1))["choices"]
        await stack.aclose()
        await until(lambda: api.service.bodies.held == 0)


async def test_stop_waits_for_no_body(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "DRAIN_S", 1000.0)
    async with server() as api, unfinished(api, 100_000) as reader:
        await until(lambda: api.service.bodies.held)
        api.stop.set()
        said = await answer(reader)
        assert said.startswith(b"HTTP/1.1 503")
        assert b"the server is shutting down" in said
        await asyncio.wait_for(api.running, 10)
    assert "Traceback" not in caplog.text
    assert "Cancel" not in caplog.text


async def test_a_body_is_not_read_before_the_model_is_there() -> None:
    async with server("slow", wait=False) as api, unfinished(api, 100_000) as reader:
        assert b"still being loaded" in await answer(reader)
        api.stop.set()
        await asyncio.wait_for(api.running, 10)


async def test_a_client_that_takes_no_answer_is_left_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "DRAIN_S", 0.0)
    wanted = {"prompt": "a", "max_tokens": 250, "stream": True, "n": 32, "logprobs": 20}
    body = json.dumps(wanted).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    async with server() as api:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", api.client.base_url.port))
            deaf.sendall(head.encode() + body)
            await until(lambda: api.counter("added_requests") == 32)
            await asyncio.wait_for(api.engine.idle.wait(), 30)
            api.stop.set()
            await asyncio.wait_for(api.running, 10)
    assert "Traceback" not in caplog.text
    assert "Cancel" not in caplog.text
