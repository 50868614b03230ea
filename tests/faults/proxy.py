"""A Unix socket between a client and its node that can be cut while either of them stands still."""

import asyncio
import contextlib
from typing import Self

PIECE_BYTES = 1 << 16


class Proxy:
    """Hands bytes on between those who connect at ``path`` and the socket at ``target``."""

    def __init__(self, path: str, target: str) -> None:
        self.address = f"unix:{path}"
        self._path = path
        self._target = target
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Ends every connection at once; new ones may be made."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        node_reader, node_writer = await asyncio.open_unix_connection(self._target)
        for source, sink in ((reader, node_writer), (node_reader, writer)):
            self._writers.add(sink)
            task = asyncio.create_task(self._hand_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _hand_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(PIECE_BYTES):
                sink.write(data)
                await sink.drain()
        self._writers.discard(sink)
        sink.transport.abort()
