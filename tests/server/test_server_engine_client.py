import asyncio
import os
import signal

import pytest
from kvstore.errors import ConfigError, UnavailableError
from kvstore_engine.config import EngineConfig
from kvstore_engine.messages import AddRequest, SamplingParams
from kvstore_engine.server import engine_client
from kvstore_engine.server.engine_client import EngineClient

from tests.server.harness import Sink, fake_engine, until


def request(name: str, *, salt: str | None = None, max_tokens: int = 3) -> AddRequest:
    return AddRequest(name, [65, 66], SamplingParams(max_tokens=max_tokens), salt)


def pid(engine: EngineClient) -> int:
    """The engine process."""
    assert engine._process is not None
    return engine._process.pid


def counter(engine: EngineClient, name: str) -> float:
    return engine.stats.counters[name] if engine.stats else 0


async def test_outputs_reach_the_sink_of_their_request() -> None:
    async with fake_engine() as engine:
        a, b = Sink(), Sink()
        engine.add(request("a"), a)
        engine.add(request("b", max_tokens=1), b)
        await asyncio.wait_for(engine.idle.wait(), 10)
        assert [o.tokens for o in a.outputs] == [[65], [66], [65]]
        assert [o.finish_reason for o in b.outputs] == ["length"]
        assert engine.open_requests == 0


async def test_an_aborted_request_hears_nothing_more() -> None:
    async with fake_engine() as engine:
        sink = Sink()
        engine.add(request("a", salt="slow", max_tokens=10_000), sink)
        await until(lambda: sink.outputs)
        engine.abort("a")
        engine.abort("a")
        seen = len(sink.outputs)
        await until(lambda: counter(engine, "aborted_requests") == 1)
        assert len(sink.outputs) == seen
        assert engine.idle.is_set()


@pytest.mark.parametrize("salt", [None, "\ud800"], ids=["number", "text"])
async def test_I11_a_request_that_cannot_be_sent_fails_alone(salt: str | None) -> None:
    async with fake_engine() as engine:
        bad, good = Sink(), Sink()
        engine.add(AddRequest("bad", [10**20 if salt is None else 65], SamplingParams(), salt), bad)
        engine.add(request("good"), good)
        await asyncio.wait_for(engine.idle.wait(), 10)
        assert [o.finish_reason for o in bad.outputs] == ["error"]
        assert good.outputs[-1].finish_reason == "length"


async def test_killed_engine_ends_open_requests_with_an_error() -> None:
    async with fake_engine() as engine:
        sink = Sink()
        engine.add(request("a", salt="hang"), sink)
        os.kill(pid(engine), signal.SIGKILL)
        await asyncio.wait_for(engine.ended.wait(), 10)
        assert sink.outputs[-1].finish_reason == "error"
        assert sink.outputs[-1].error == "the engine process ended by signal 9"
        assert engine.state == "dead"
        with pytest.raises(UnavailableError, match="signal 9"):
            engine.add(request("b"), sink)


@pytest.mark.parametrize(
    ("manner", "kind", "message"),
    [
        ("fail-usage", ConfigError, "no such luck"),
        ("fail", UnavailableError, "no such luck"),
        ("crash", UnavailableError, "the engine process ended with exit code 7"),
    ],
)
async def test_a_failed_start_says_why(manner: str, kind: type[Exception], message: str) -> None:
    async with fake_engine(manner, wait=False) as engine:
        with pytest.raises(kind, match=message):
            await asyncio.wait_for(engine.wait_ready(), 10)
        await asyncio.wait_for(engine.ended.wait(), 10)
        assert engine.death == message


async def test_a_command_that_ends_at_once_is_a_failed_start() -> None:
    engine = EngineClient(["false"])
    await engine.start(EngineConfig(model="x"))
    with pytest.raises(UnavailableError, match="exit code 1"):
        await asyncio.wait_for(engine.wait_ready(), 10)
    await engine.close()


async def test_close_while_loading_ends_the_process() -> None:
    async with fake_engine("slow", wait=False) as engine:
        child, directory = pid(engine), engine._directory
        with pytest.raises(UnavailableError, match="still being loaded"):
            engine.add(request("a"), Sink())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not directory.exists()


async def test_close_kills_a_process_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "STOP_TIMEOUT_S", 0.2)
    async with fake_engine("stubborn", wait=False) as engine:
        child = pid(engine)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


async def test_retire_ends_what_is_open_in_the_engine_too() -> None:
    async with fake_engine() as engine:
        sink = Sink()
        engine.add(request("a", salt="hang"), sink)
        engine.retire("enough")
        assert sink.outputs[-1].error == "enough"
        await until(lambda: counter(engine, "aborted_requests") == 1)


async def test_sockets_leave_no_names_once_both_ends_are_connected() -> None:
    async with fake_engine() as engine:
        await until(lambda: not engine._directory.exists())


async def test_an_engine_may_be_ready_before_it_can_hear() -> None:
    async with fake_engine("connects-late") as engine:
        engine.reset_cache()
        await until(lambda: counter(engine, "cache_resets") == 1)
        await until(lambda: not engine._directory.exists())


async def test_reset_cache_reaches_the_engine() -> None:
    async with fake_engine() as engine:
        engine.reset_cache()
        await until(lambda: counter(engine, "cache_resets") == 1)
