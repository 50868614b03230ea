"""Fake engines, and servers over them."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from kvstore_engine.config import EngineConfig
from kvstore_engine.messages import RequestOutput
from kvstore_engine.server.config import ServerConfig
from kvstore_engine.server.engine_client import EngineClient
from kvstore_engine.server.metrics import Metrics
from kvstore_engine.server.service import Service
from kvstore_engine.server.serving import listen, run_http
from kvstore_engine.tokenizer import load_tokenizer

FAKE_COMMAND = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
MODEL = "tiny-random"
DEADLINE_S = 20.0


async def until(condition: Callable[[], object]) -> None:
    """Waits for a condition; fails after a while."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # the condition is of another process
            await asyncio.sleep(0.01)


@asynccontextmanager
async def fake_engine(manner: str = "", *, wait: bool = True) -> AsyncIterator[EngineClient]:
    """A started fake engine; ``manner`` is what fake_engine.py reads as engine_id."""
    client = EngineClient(FAKE_COMMAND)
    try:
        await client.start(EngineConfig(model=MODEL, engine_id=manner))
        if wait:
            await client.wait_ready()
        yield client
    finally:
        await client.close()


class Sink:
    """Collects the outputs of one request."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []

    def __call__(self, output: RequestOutput) -> None:
        self.outputs.append(output)


@dataclass
class Server:
    """A server in this process over a fake engine in another, and a client to it."""

    service: Service
    client: httpx.AsyncClient
    stop: asyncio.Event
    hurry: asyncio.Event
    running: "asyncio.Task[None]"

    @property
    def engine(self) -> EngineClient:
        """The server's end of the engine process."""
        return self.service.engine

    async def post(self, path: str, **body: Any) -> httpx.Response:
        """A POST of JSON."""
        return await self.client.post(path, json=body)

    async def complete(self, **body: Any) -> dict[str, Any]:
        """A completion that has to succeed."""
        response = await self.post("/v1/completions", **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream; its end marker has to be there."""
        response = await self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    async def metric(self, name: str) -> float:
        """The value of one metric line, 0 where it is not there."""
        text = (await self.client.get("/metrics")).text
        for line in text.splitlines():
            if line.startswith(f"kvstore_engine_{name} "):
                return float(line.split()[-1])
        return 0.0

    def counter(self, name: str) -> float:
        """A counter of the fake engine."""
        return self.engine.stats.counters[name] if self.engine.stats else 0


@asynccontextmanager
async def server(manner: str = "", *, wait: bool = True) -> AsyncIterator[Server]:
    """A server on a free port."""
    config = ServerConfig(model=MODEL, port=0)
    async with fake_engine(manner, wait=wait) as engine:
        metrics = Metrics(lambda: engine.stats)
        service = Service(engine, load_tokenizer(MODEL), metrics, names=("alias",))
        listener = listen(config.host, config.port)
        stop, hurry = asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(run_http(service, listener, config, stop, hurry))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S) as client:
            yield Server(service, client, stop, hurry, running)
        stop.set()
        await asyncio.gather(running, return_exceptions=True)
        listener.close()
