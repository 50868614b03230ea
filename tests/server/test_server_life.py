"""Clients that leave, engines that die, servers that are told to stop."""

import asyncio
import os
import signal

import httpx
import pytest
from kvstore.errors import UnavailableError
from kvstore_engine.server import serving

from tests.server.harness import server, until

SLOW = {"prompt": "abc", "max_tokens": 250, "cache_salt": "slow"}
HANG = {"prompt": "abc", "cache_salt": "hang"}


async def test_client_that_leaves_a_stream_frees_its_request() -> None:
    async with server() as api:
        request = api.client.stream("POST", "/v1/completions", json=SLOW | {"stream": True, "n": 2})
        async with request as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            assert api.engine.open_requests == 2
        await until(lambda: api.counter("aborted_requests") == 2)
        assert api.engine.open_requests == 0
        assert await api.metric('requests_total{finish_reason="abort"}') == 2


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_client_that_leaves_before_the_first_token(stream: bool) -> None:
    async with server() as api:
        with pytest.raises(httpx.ReadTimeout):
            async with api.client.stream(
                "POST", "/v1/chat/completions", timeout=0.2,
                json={"messages": [{"role": "user", "content": "x"}], "cache_salt": "hang",
                      "stream": stream},
            ) as response:  # fmt: skip
                await response.aread()
        await until(lambda: api.counter("aborted_requests") == 1)
        assert api.engine.open_requests == 0


async def test_I11_bytes_that_are_no_request_and_bodies_that_never_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with server() as api:
        port = api.client.base_url.port
        for data in (
            b"\x00\xff\x16\x03 garbage\r\n\r\n",
            b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
            b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: -4\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            async with asyncio.timeout(10):
                assert b"200" not in await reader.read()
            writer.close()
        assert (await api.client.get("/health")).status_code == 200
    assert "Traceback" not in caplog.text


async def test_I9_engine_death_fails_open_requests_and_then_the_server() -> None:
    async with server() as api:
        whole = asyncio.create_task(api.post("/v1/completions", **HANG))
        stream = asyncio.create_task(api.events("/v1/completions", **HANG))
        await until(lambda: api.engine.open_requests == 2)
        assert api.engine._process is not None
        os.kill(api.engine._process.pid, signal.SIGKILL)
        assert (await whole).status_code == 503
        assert "signal 9" in (await stream)[-1]["error"]["message"]
        health = await api.client.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "dead", "reason": "the engine process ended by signal 9"}
        with pytest.raises(UnavailableError, match="signal 9"):
            await asyncio.wait_for(api.running, 10)


async def test_while_the_model_loads_everything_is_a_503() -> None:
    async with server("slow", wait=False) as api:
        health = await api.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        response = await api.post("/v1/completions", prompt="a")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "still being loaded" in response.json()["error"]["message"]
        assert (await api.client.get("/metrics")).status_code == 200
        api.stop.set()
        await asyncio.wait_for(api.running, 10)


async def test_failed_start_ends_the_server() -> None:
    async with server("fail", wait=False) as api:
        with pytest.raises(UnavailableError, match="no such luck"):
            await asyncio.wait_for(api.running, 10)


async def test_stop_lets_open_requests_finish() -> None:
    async with server() as api:
        body = SLOW | {"max_tokens": 20}
        answer = asyncio.create_task(api.post("/v1/completions", **body))
        await until(lambda: api.engine.open_requests)
        api.stop.set()
        assert (await answer).json()["usage"]["completion_tokens"] == 20
        await asyncio.wait_for(api.running, 10)
        with pytest.raises(httpx.ConnectError):
            await api.client.get("/health")


async def test_stop_ends_requests_that_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "DRAIN_S", 0.2)
    async with server() as api:
        whole = asyncio.create_task(api.post("/v1/completions", **HANG))
        stream = asyncio.create_task(api.events("/v1/completions", **HANG))
        await until(lambda: api.engine.open_requests == 2)
        api.stop.set()
        assert (await whole).status_code == 503
        assert (await stream)[-1]["error"]["message"] == "the server is shutting down"
        await asyncio.wait_for(api.running, 10)


async def test_a_second_signal_ends_open_requests_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "DRAIN_S", 1000.0)
    caplog.set_level("INFO")
    async with server() as api:
        stream = asyncio.create_task(api.events("/v1/completions", **HANG))
        await until(lambda: api.engine.open_requests == 1)
        api.stop.set()
        await until(lambda: "waiting up to 1000 s for 1 open requests" in caplog.text)
        assert not stream.done()
        api.hurry.set()
        assert (await stream)[-1]["error"]["message"] == "the server is shutting down"
        await asyncio.wait_for(api.running, 10)


async def test_metrics_hold_what_usage_says() -> None:
    async with server() as api:
        await api.post("/v1/completions", prompt="abc", max_tokens=5)
        await api.post("/v1/completions", prompt=["abc", "de"], max_tokens=2, n=2)
        expected = {
            "prompt_tokens_total": 8,
            "generation_tokens_total": 13,
            'cached_tokens_total{tier="hbm"}': 6,
            'cached_tokens_total{tier="dram"}': 3,
            'cached_tokens_total{tier="ssd"}': 0,
            'prefix_ends_total{reason="evicted"}': 3,
            'requests_total{finish_reason="length"}': 5,
            "time_to_first_token_seconds_count": 5,
            "inter_token_latency_seconds_count": 8,
            "requests_waiting": 3,
            "pages_free": 5,
            "added_requests_total": 5,
            'http_responses_total{route="/v1/completions",status="200"}': 2,
        }
        await until(lambda: api.counter("added_requests") == 5)
        assert {name: await api.metric(name) for name in expected} == expected
        await api.client.get("/elsewhere")
        assert await api.metric('http_responses_total{route="other",status="404"}') == 1
