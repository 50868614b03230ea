"""A node in the test's own process: a dict, a real pool, and answers that a test can bend."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import xxhash
from kvstore.core.directory import DirectoryWriter
from kvstore.core.keys import namespace_root, split_keys
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, Tier
from kvstore_proto import common_pb2, node_pb2, node_pb2_grpc

POOL_BYTES = 1 << 20
ENTRIES = 1 << 12

Request = node_pb2.SessionRequest
Response = node_pb2.SessionResponse


class FakeNode(node_pb2_grpc.NodeServicer):
    """Hands slots out one after the other and never reuses one.

    ``answer`` may be replaced: it gets each request and returns responses in place of the node's
    own, or None to leave it to the node.
    """

    def __init__(self, directory: Path, instance: int = 1) -> None:
        self.directory = directory
        self.instance = instance
        self.address = f"unix:{directory}/node.sock"
        self.slots: dict[bytes, int] = {}
        self.checksums: dict[bytes, int] = {}
        self.pinned: dict[int, int] = {}
        self.requests: list[Request] = []  # each release as one of its own
        self.messages = 0
        self.answer: Callable[[Request], list[Response] | None] = lambda request: None
        self.hang_up = asyncio.Event()
        self._arrived = asyncio.Event()
        self._reserved: dict[int, dict[int, bytes]] = {}
        self._offsets: dict[tuple[int, int], int] = {}
        self._next_offset = 0
        self._block_bytes = 0
        self._server: grpc.aio.Server | None = None
        self.pool, self.pool_path = self._file("pool", POOL_BYTES)
        size = DirectoryWriter.size_bytes(ENTRIES, POOL_BYTES)
        self._directory, self.directory_path = self._file("directory", size)
        self.writer = DirectoryWriter(
            self._directory.data, entries=ENTRIES, pool_bytes=POOL_BYTES, instance=instance
        )

    def _file(self, name: str, nbytes: int) -> tuple[Any, Path]:
        path = self.directory / f"{name}-{self.instance}"
        path.write_bytes(bytes(nbytes))
        os.chmod(path, 0o600)
        return np.memmap(path, dtype=np.uint8, mode="r+"), path

    async def start(self) -> None:
        """Serves."""
        self._server = grpc.aio.server()
        node_pb2_grpc.add_NodeServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        """Ends every stream."""
        self.hang_up.set()
        assert self._server is not None
        await self._server.stop(0)

    def kinds(self) -> list[str]:
        """Names of the requests that came."""
        return [request.WhichOneof("request") or "" for request in self.requests]

    def last(self, kind: str) -> Any:
        """The last request of that kind."""
        return next(
            getattr(request, kind)
            for request in reversed(self.requests)
            if request.WhichOneof("request") == kind
        )

    async def wait_for(self, kind: str, count: int = 1) -> None:
        """Until ``count`` requests of that kind have come."""
        async with asyncio.timeout(5):
            while self.kinds().count(kind) < count:
                self._arrived.clear()
                await self._arrived.wait()

    async def Session(  # type: ignore[override]
        self, request_iterator: object, context: Any
    ) -> None:
        hanging = asyncio.create_task(self.hang_up.wait())
        while True:
            reading = asyncio.ensure_future(context.read())
            await asyncio.wait((reading, hanging), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                reading.cancel()
                return
            request = reading.result()
            if request is grpc.aio.EOF:
                hanging.cancel()
                return
            self.messages += 1
            for one in (*(Request(release=release) for release in request.released), request):
                await self._answer(one, context)

    async def _answer(self, request: Request, context: Any) -> None:
        self.requests.append(request)
        self._arrived.set()
        responses = self.answer(request)
        for response in self.own_answer(request) if responses is None else responses:
            response.id = response.id or request.id
            await context.write(response)

    async def Stats(self, request: node_pb2.StatsRequest, context: Any) -> node_pb2.StatsResponse:
        return node_pb2.StatsResponse(node_id="fake", instance=self.instance)

    def own_answer(self, request: Request) -> list[Response]:
        """What a well-behaved node says."""
        kind = request.WhichOneof("request")
        handler = getattr(self, f"_{kind}", None)
        return handler(request) if handler is not None else []

    def _hello(self, request: Request) -> list[Response]:
        return [
            Response(
                welcome=node_pb2.Welcome(
                    node_id="fake",
                    instance=self.instance,
                    pool_path=str(self.pool_path),
                    pool_bytes=POOL_BYTES,
                    directory_path=str(self.directory_path),
                    directory_bytes=len(self._directory),
                )
            )
        ]

    def _open_namespace(self, request: Request) -> list[Response]:
        spec = request.open_namespace.spec
        self._block_bytes = spec.block_bytes
        same = CacheSpec(**{field.name: getattr(spec, field.name) for field in fields(CacheSpec)})
        opened = node_pb2.NamespaceOpened(namespace_id=7, root=namespace_root(same))
        return [Response(namespace_opened=opened)]

    def run(self, first: int, offset: int) -> node_pb2.SlotRun:
        """One slot."""
        stride = -(-self._block_bytes // 4096) * 4096
        return node_pb2.SlotRun(
            first=first, count=1, offset=offset, stride=stride, source=common_pb2.TIER_DRAM
        )

    def _acquire(self, request: Request) -> list[Response]:
        keys = split_keys(request.acquire.keys)
        held = 0
        while held < len(keys) and keys[held] in self.slots:
            held += 1
        offsets = np.array([self.slots[key] for key in keys[:held]], dtype=np.int64)
        self.pinned[request.id] = held
        granted = node_pb2.Granted(
            runs=[self.run(i, offset) for i, offset in enumerate(offsets.tolist())],
            generations=self.writer.generations[offsets // 4096].astype("<u4").tobytes(),
        )
        reason = EndReason.COMPLETE if held == len(keys) else EndReason.NEVER_STORED
        end = node_pb2.End(granted=held, reason=common_pb2.EndReason.ValueType(reason))
        return [Response(granted=granted), Response(end=end)] if held else [Response(end=end)]

    def _release(self, request: Request) -> list[Response]:
        self.pinned.pop(request.release.acquire_id, None)
        return []

    def _reserve(self, request: Request) -> list[Response]:
        reserve = request.reserve
        stride = -(-self._block_bytes // 4096) * 4096
        statuses, runs = bytearray(), []
        mine = self._reserved[request.id] = {}
        for i, key in enumerate(split_keys(reserve.keys)):
            if key in self.slots:
                statuses.append(ReserveStatus.HAVE)
            elif self._next_offset + stride > POOL_BYTES:
                statuses.append(ReserveStatus.FULL)
            else:
                statuses.append(ReserveStatus.SLOT)
                mine[i] = key
                self._offsets[request.id, i] = self._next_offset
                runs.append(self.run(i, self._next_offset))
                self.writer.bump_generations(np.array([self._next_offset]))
                self._next_offset += stride
        offsets = np.array([run.offset for run in runs], dtype=np.int64)
        generations = self.writer.generations_at(offsets).astype("<u4").tobytes()
        reserved = node_pb2.Reserved(statuses=bytes(statuses), runs=runs, generations=generations)
        return [Response(reserved=reserved)]

    def _commit(self, request: Request) -> list[Response]:
        commit = request.commit
        levels = bytearray()
        sums = np.frombuffer(commit.checksums, dtype="<u8").tolist()
        for index, checksum in zip(commit.indices, sums, strict=True):
            key = self._reserved[commit.reserve_id].pop(index)
            offset = self._offsets[commit.reserve_id, index]
            stored = self.pool[offset : offset + self._block_bytes].tobytes()
            if xxhash.xxh3_64_intdigest(stored) != checksum:
                levels.append(0)
                continue
            self.slots[key] = offset
            self.checksums[key] = checksum
            self.writer.publish(key, Tier.DRAM)
            levels.append(commit.level or AckLevel.MEMORY)
        return [Response(committed=node_pb2.Committed(levels=bytes(levels)))]

    def _abort(self, request: Request) -> list[Response]:
        reserved = self._reserved.get(request.abort.reserve_id, {})
        indices = list(request.abort.indices) or list(reserved)
        for index in indices:
            reserved.pop(index, None)
        return [Response(aborted=node_pb2.Aborted(count=len(indices)))]

    def _prefetch(self, request: Request) -> list[Response]:
        count = len(request.prefetch.keys) // 32
        return [Response(prefetched=node_pb2.Prefetched(started=count))]

    def error(self, code: int, message: str) -> list[Response]:
        """The answer that refuses a request."""
        return [Response(error=node_pb2.SessionError(code=code, message=message))]

    def refuse(self, kind: str, code: int, message: str) -> None:
        """Answers every request of that kind with an error."""
        self.answer = lambda request: (
            self.error(code, message) if request.WhichOneof("request") == kind else None
        )

    def ignore(self, *kinds: str) -> None:
        """Answers no request of these kinds."""
        self.answer = lambda request: [] if request.WhichOneof("request") in kinds else None

    def open_slots(self) -> int:
        """Slots that were reserved and neither committed nor given back."""
        return sum(len(keys) for keys in self._reserved.values())
