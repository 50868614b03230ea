"""What the tests of a node share: nodes, raw sessions, and blocks whose bytes are known."""

import asyncio
import itertools
import mmap
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import xxhash
from kvstore import daemon
from kvstore.core.directory import DirectoryReader
from kvstore.core.spec import CacheSpec
from kvstore.node import translate
from kvstore.node.node import Node
from kvstore.node.process_watch import own_pid_namespace, start_ticks
from kvstore.node.service import NodeService, request_bytes_max
from kvstore.node.settings import NodeConfig
from kvstore_proto import node_pb2, node_pb2_grpc

from tests.faults.daemons import daemon_command

TIMEOUT_S = 10.0
BLOCK_BYTES = 16384
SPEC = CacheSpec.raw("test", block_bytes=BLOCK_BYTES)
SLOT, HAVE, FULL, BUSY = 1, 2, 3, 4
MEMORY, PERSISTED, SYNCED = 1, 2, 3


def keys_of(count: int, seed: int = 1) -> list[bytes]:
    """Keys of a chain."""
    make = random.Random(seed).randbytes
    return [make(32) for _ in range(count)]


def data_of(key: bytes, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The bytes that belong to a key, and to no other."""
    return (key * (block_bytes // 32 + 1))[:block_bytes]


def checksum(data: bytes | memoryview) -> bytes:
    """xxh3-64 as a Commit carries it."""
    return xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """Waits for a condition; seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + timeout_s, "the condition was not met in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


class LocalNode:
    """A node and its server on the event loop of the test."""

    def __init__(self, folder: Path, **settings: object) -> None:
        defaults: dict[str, Any] = {
            "data_dir": folder / "data",
            "pool_dir": folder,
            "dram": 4 << 20,
            "ssd": 16 << 20,
        }
        self.config = NodeConfig(**{**defaults, **settings})
        self.node: Node
        self._server: daemon.GrpcServer | None = None

    async def start(self) -> None:
        self.node = Node(self.config)
        self._server = await daemon.start_grpc_server(
            self.config.address,
            lambda server: node_pb2_grpc.add_NodeServicer_to_server(NodeService(self.node), server),
            ["kvstore.v1.Node"],
            request_bytes_max=request_bytes_max(self.node.core.config),
        )
        self.node.start()

    async def stop(self) -> None:
        if self._server is not None:
            self.node.clients.end_all()
            await self._server.stop(0.5)
            self._server = None
            await self.node.close()

    @property
    def address(self) -> str:
        return self.config.address

    def usage(self, tier: int = 2) -> Any:
        return next(u for u in self.node.core.usage() if u.tier == tier)

    async def idle(self) -> None:
        """Nothing waits, and the accounts add up."""
        await until(self.node.core.idle)
        self.node.core.check_integrity()


class Daemon:
    """A kvstore-node process."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.socket = folder / "node.sock"
        self.address = f"unix:{self.socket}"
        command = [*daemon_command("kvstore.node.daemon"), "--data-dir", str(folder / "data")]
        command += ["--pool-dir", str(folder), "--dram", "4MiB", "--ssd", "16MiB"]
        command += ["--listen", self.address, "--metrics-listen", "", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_ready(self) -> str:
        """The line that it prints when it serves."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        line = self.process.stdout.readline() if ready else ""
        assert line.startswith("kvstore-node ready: "), (line, self.stop()[1])
        return line.strip()

    def stop(self) -> tuple[int, str]:
        """SIGTERM; exit code and what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, errors

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.communicate(timeout=TIMEOUT_S)


class RawSession:
    """A session spoken message by message; answers are kept until they are asked for."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub: Any = node_pb2_grpc.NodeStub(self._channel)
        self.stream = self.stub.Session()
        self._ids = itertools.count(1)
        self._kept: list[node_pb2.SessionResponse] = []
        self.welcome: node_pb2.Welcome
        self.pool: mmap.mmap
        self.namespace = 0
        self.root = b""

    @classmethod
    async def open(
        cls, address: str, *, namespace: bool = True, spec: CacheSpec = SPEC, **hello: Any
    ) -> Self:
        """A session with a namespace, unless told otherwise."""
        session = cls(address)
        response = await session.call(hello=hello_message(**hello))
        session.welcome = response.welcome
        session.map_pool()
        if namespace:
            await session.open_namespace(spec)
        return session

    def map_pool(self) -> None:
        with open(self.welcome.pool_path, "r+b") as file:
            self.pool = mmap.mmap(file.fileno(), self.welcome.pool_bytes)

    async def open_namespace(self, spec: CacheSpec, tenant: str = "") -> None:
        request = node_pb2.OpenNamespace(spec=translate.spec_to_message(spec), tenant=tenant)
        opened = (await self.call(open_namespace=request)).namespace_opened
        self.namespace, self.root = opened.namespace_id, opened.root

    async def send(self, request_id: int | None = None, **request: Any) -> int:
        """Sends a request and returns its id."""
        request_id = next(self._ids) if request_id is None else request_id
        await self.stream.write(node_pb2.SessionRequest(id=request_id, **request))
        return request_id

    async def receive(self, request_id: int) -> node_pb2.SessionResponse:
        """The next answer to a request."""
        for i, kept in enumerate(self._kept):
            if kept.id == request_id:
                return self._kept.pop(i)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                response: Any = await self.stream.read()
                if response is grpc.aio.EOF:
                    raise EOFError
                if response.id == request_id:
                    return response  # type: ignore[no-any-return]
                self._kept.append(response)

    async def call(self, **request: Any) -> node_pb2.SessionResponse:
        return await self.receive(await self.send(**request))

    # What a client does

    async def reserve(self, keys: Sequence[bytes], **more: Any) -> tuple[int, node_pb2.Reserved]:
        request = node_pb2.Reserve(namespace_id=self.namespace, keys=b"".join(keys), **more)
        request_id = await self.send(reserve=request)
        return request_id, (await self.receive(request_id)).reserved

    async def put(self, keys: Sequence[bytes], level: int = MEMORY, **more: Any) -> bytes:
        """Stores the blocks of the keys; the levels reached."""
        request_id, reserved = await self.reserve(keys, **more)
        indices, sums = [], b""
        for index, view in self.slots(reserved.runs):
            view[:] = data_of(keys[index])
            sums += checksum(view)
            indices.append(index)
            view.release()
        commit: Any = {
            "reserve_id": request_id,
            "indices": indices,
            "checksums": sums,
            "level": level,
        }
        return (await self.call(commit=node_pb2.Commit(**commit))).committed.levels

    def slots(self, runs: Sequence[node_pb2.SlotRun]) -> list[tuple[int, memoryview]]:
        """(index, bytes in the pool) of each block in the runs."""
        pool = memoryview(self.pool)
        return [
            (run.first + i, pool[start : start + BLOCK_BYTES])
            for run in runs
            for i in range(run.count)
            for start in (run.offset + i * run.stride,)
        ]

    async def acquire(
        self, keys: Sequence[bytes], timeout_ms: int = 5000, **more: Any
    ) -> tuple[int, list[node_pb2.Granted], Any]:
        """(id, all Granted, End)."""
        request = node_pb2.Acquire(
            namespace_id=self.namespace, keys=b"".join(keys), timeout_ms=timeout_ms, **more
        )
        request_id = await self.send(acquire=request)
        granted: list[node_pb2.Granted] = []
        while True:
            response = await self.receive(request_id)
            if response.WhichOneof("response") != "granted":
                assert response.WhichOneof("response") == "end", response
                return request_id, granted, response.end
            granted.append(response.granted)
            if response.granted.HasField("end"):
                return request_id, granted, response.granted.end

    async def check(self, keys: Sequence[bytes], **more: Any) -> Any:
        """Acquires, compares every granted byte, and releases."""
        request_id, granted, end = await self.acquire(keys, **more)
        blocks = [slot for part in granted for slot in self.slots(part.runs)]
        assert [index for index, _ in blocks] == list(range(end.granted))
        for index, view in blocks:
            assert view == data_of(keys[index])
            view.release()
        await self.send(release=node_pb2.Release(acquire_id=request_id))
        return end

    def directory(self) -> DirectoryReader:
        """The shared-memory directory as a client maps it."""
        with open(self.welcome.directory_path, "rb") as file:
            return DirectoryReader(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))

    async def stats(self) -> node_pb2.StatsResponse:
        return await self.stub.Stats(node_pb2.StatsRequest())  # type: ignore[no-any-return]

    async def goodbye(self) -> None:
        await self.send(goodbye=node_pb2.Goodbye())
        await self.stream.done_writing()
        assert await self.stream.read() is grpc.aio.EOF
        await self._channel.close()

    async def lose(self) -> None:
        """The stream breaks; the process lives on."""
        self.stream.cancel()
        await self._channel.close()


def hello_message(**fields: Any) -> node_pb2.Hello:
    """Hello of this process."""
    pid = os.getpid()
    defaults: dict[str, Any] = {
        "protocol_version": 2,
        "client_id": os.urandom(8).hex(),
        "pid": pid,
        "pid_namespace": own_pid_namespace(),
        "process_start_ticks": start_ticks(pid),
        "name": "test",
    }
    return node_pb2.Hello(**{**defaults, **fields})


def generations(granted: Sequence[node_pb2.Granted]) -> list[int]:
    """Generations of all granted blocks."""
    return [int(g) for part in granted for g in np.frombuffer(part.generations, dtype="<u4")]


async def put_one_corrupt(session: "RawSession", keys: list[bytes], bad: int) -> bytes:
    """Commits ``keys`` at SYNCED, one with a bit flipped after its hash; the levels reached."""
    reserve_id, reserved = await session.reserve(keys)
    sums = b""
    for index, view in session.slots(reserved.runs):
        view[:] = data_of(keys[index])
        sums += checksum(view)
        if index == bad:
            view[BLOCK_BYTES - 1] ^= 1
        view.release()
    commit = node_pb2.Commit(
        reserve_id=reserve_id,
        indices=range(len(keys)),
        checksums=sums,
        level=SYNCED,  # type: ignore[arg-type]
    )
    return (await session.call(commit=commit)).committed.levels
