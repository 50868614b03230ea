"""Server-sent events: the wire form of a streamed answer."""

from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One event with ``data`` as JSON."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of events that calls ``on_end`` exactly once, however it ends.

    A client that goes away cancels the response wherever it stands, so the iterator itself may
    never be resumed; what has to be given back is given back by ``on_end``.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
