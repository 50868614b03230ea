"""Answers a generation over HTTP, whole or as a stream; the formats fill in the choices."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from kvstore_engine.messages import FinishReason, TokenLogprob
from kvstore_engine.server import sse
from kvstore_engine.server.errors import ApiError
from kvstore_engine.server.generation import Delta, Generation

CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is for the metrics
Json = dict[str, object]


@dataclass(slots=True)
class Choice:
    """One whole choice, gathered from its deltas."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Appends what is new."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


class Format(Protocol):
    """How one API writes its choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """The choice of a chunk that stands before the first token, if there is one."""
        ...

    def part(self, delta: Delta) -> Json:
        """The choice of a chunk."""
        ...

    def whole(self, choice: Choice) -> Json:
        """A choice of a whole answer."""
        ...


@dataclass(slots=True)
class Answer:
    """A started generation on its way to the client."""

    generation: Generation
    format: Format
    model: str
    show_tokens: bool
    include_usage: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def stream(self) -> Response:
        """The answer as server-sent events."""
        return sse.EventStream(self._events(), self.generation.close)

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; stops computing when the client goes away."""
        choices = [Choice(index) for index in range(self.generation.choices)]

        async def gather() -> None:
            async for delta in self.generation.deltas():
                choices[delta.index].add(delta)

        try:
            if not await _unless_gone(request, gather()):
                return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            self.generation.close()
        body = self._envelope(self.format.whole_object, [self.format.whole(c) for c in choices])
        body["usage"] = self.generation.usage.to_json()
        return Response(msgspec.json.encode(body), media_type="application/json")

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": f"{self.format.id_prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> bytes:
        body = self._envelope(self.format.chunk_object, choices)
        if self.include_usage:
            body["usage"] = usage
        return sse.event(body)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            for index in range(self.generation.choices):
                if (opening := self.format.opening(index)) is not None:
                    yield self._chunk([opening])
            async for delta in self.generation.deltas():
                if self._visible(delta):
                    yield self._chunk([self.format.part(delta)])
            if self.include_usage:
                yield self._chunk([], self.generation.usage.to_json())
        except ApiError as error:
            yield sse.event(error.body())
        yield sse.DONE

    def _visible(self, delta: Delta) -> bool:
        news = delta.text or delta.finish_reason or delta.logprobs
        return bool(news or (self.show_tokens and delta.tokens))


async def _unless_gone(request: Request, work: Coroutine[None, None, None]) -> bool:
    """Runs ``work`` to its end and returns True, or cancels it when the client disconnects."""
    running = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((running, watching), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
            return True
        return False
    finally:
        for task in (running, watching):
            task.cancel()
        await asyncio.gather(running, watching, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
