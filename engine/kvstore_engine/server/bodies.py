"""Reads the bodies of requests, within limits of size and time, and of all together."""

import asyncio
from dataclasses import dataclass, field

from fastapi import Request
from starlette.requests import ClientDisconnect

from kvstore_engine.server.errors import ApiError, bad_request
from kvstore_engine.server.protocol import PROMPTS_MAX

BODY_BYTES_MAX = 32 << 20
BODY_BYTES_MIN = 1 << 20  # that every model takes
TOKEN_BYTES = 8  # of a token id and what separates it, or of a token's text
BODIES_BYTES_MAX = 128 << 20  # of all bodies that are being read
UNCOUNTED_BYTES = 16 << 10  # of each: small requests go on, whatever others do
BODY_S = 60.0

STOPPING = "the server is shutting down"


def bytes_max(context: int) -> int:
    """The largest body: room for PROMPTS_MAX prompts that each fill the context."""
    return min(BODY_BYTES_MAX, BODY_BYTES_MIN + TOKEN_BYTES * PROMPTS_MAX * context)


@dataclass(slots=True)
class Bodies:
    """The bodies that are being read."""

    held: int = 0  # bytes that count against BODIES_BYTES_MAX
    _stopped: bool = False
    _reading: set[asyncio.Timeout] = field(default_factory=set)

    async def read(self, request: Request, limit: int) -> bytearray:
        """The body, of at most ``limit`` bytes.

        Raises ApiError with 413 for a larger one, 408 for one that takes longer than BODY_S, 503
        where all bodies together are too many or once ``stop`` was called.
        """
        if int(request.headers.get("content-length", 0)) > limit:
            raise _too_large(limit)
        timeout = asyncio.timeout(0 if self._stopped else BODY_S)
        self._reading.add(timeout)
        try:
            async with timeout:
                return await self._collect(request, limit)
        except TimeoutError:
            if self._stopped:
                raise ApiError(503, STOPPING) from None
            raise ApiError(408, f"the body did not come within {BODY_S:.0f} s") from None
        except ClientDisconnect:
            raise bad_request("the connection ended before the body did") from None
        finally:
            self._reading.discard(timeout)

    def stop(self) -> None:
        """Ends all reading, now and from now on."""
        self._stopped = True
        for timeout in self._reading:
            if not timeout.expired():
                timeout.reschedule(0)

    async def _collect(self, request: Request, limit: int) -> bytearray:
        data, counted = bytearray(), 0
        try:
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise _too_large(limit)
                more = max(len(data) - UNCOUNTED_BYTES, 0) - counted
                counted += more
                self.held += more
                if self.held > BODIES_BYTES_MAX:
                    raise ApiError(503, "too many large requests are being read; try again later")
        finally:
            self.held -= counted
        return data


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than {limit / (1 << 20):.3g} MiB")
