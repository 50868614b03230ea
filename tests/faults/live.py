"""Real daemons that are killed, stopped and started again, in directories with short paths."""

import asyncio
import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from kvstore_proto import master_pb2, master_pb2_grpc, node_pb2, node_pb2_grpc

from tests.faults.daemons import daemon_command

READY_TIMEOUT_S = 30.0
HEAL_TIMEOUT_S = 5.0  # I9, besides two heartbeats
MIB = 1 << 20
COVERAGE = "COVERAGE_PROCESS_CONFIG"


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a process that will be killed: its coverage would be lost, and makes its start slow."""
    kept = {name: value for name, value in os.environ.items() if name != COVERAGE}
    return {**kept, **(more or {})}


async def until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Waits for a condition; seconds that it took. AssertionError after ``timeout_s``."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + timeout_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.002)
    return time.monotonic() - start


class LiveDaemon:
    """One daemon of this product in a process of its own, its log in ``home/log``."""

    def __init__(self, module: str, *flags: str, environ: Mapping[str, str] | None = None) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="kvs-"))
        self._command = [*daemon_command(module), *flags, "--metrics-listen", ""]
        self._environ = environment(environ)
        self.process: subprocess.Popen[str] | None = None
        self.address = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self.process is not None
        return self.process.pid

    def spawn(self) -> None:
        """Starts the process, and does not wait for it."""
        with open(self.home / "log", "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environ
            )

    def wait_ready(self) -> str:
        """The line that it prints when it serves."""
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], READY_TIMEOUT_S)
        line = self.process.stdout.readline() if ready else ""
        if " ready: " not in line:
            raise AssertionError(f"{self._command[2]} is not ready: {line!r}\n{self.log_tail()}")
        return line.strip().rpartition(" ready: ")[2]

    def start(self) -> str:
        """Starts it and waits until it serves; its address."""
        self.spawn()
        self.address = self.wait_ready()
        return self.address

    def log_tail(self) -> str:
        """The end of what it logged."""
        return (self.home / "log").read_text(errors="replace")[-4000:]

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and waits for the end."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(READY_TIMEOUT_S)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def close(self) -> None:
        """Kills it and removes its files."""
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)


class LiveNode(LiveDaemon):
    """A kvstore-node with small tiers."""

    def __init__(
        self,
        *flags: str,
        dram: int = 4 * MIB,
        ssd: int = 8 * MIB,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.pool_dir = tempfile.mkdtemp(prefix="kvs-", dir="/dev/shm")
        super().__init__("kvstore.node.daemon", *flags, environ=environ)
        self.address = f"unix:{self.home}/node.sock"
        self._command += ["--data-dir", str(self.home), "--pool-dir", self.pool_dir]
        self._command += ["--dram", str(dram), "--ssd", str(ssd), "--log-level", "warning"]

    def close(self) -> None:
        """Kills it and removes its files."""
        super().close()
        shutil.rmtree(self.pool_dir, ignore_errors=True)


class LiveMaster(LiveDaemon):
    """A kvstore-master on a port of its own."""

    def __init__(self, *flags: str, environ: Mapping[str, str] | None = None) -> None:
        super().__init__("kvstore.master.daemon", *flags, environ=environ)
        self._command += ["--data-dir", str(self.home), "--log-level", "warning"]
        self._command += ["--listen", "127.0.0.1:0"]


class ClientProcess:
    """A client in a process of its own, told what to do line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.signal = process.send_signal
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, module: str, *arguments: str, environ: Mapping[str, str] | None = None
    ) -> AsyncIterator[Self]:
        """Runs ``module`` until the exit, and kills it then."""
        process = await asyncio.create_subprocess_exec(
            *daemon_command(module),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment(environ),
        )
        try:
            yield cls(process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    def tell(self, line: str) -> None:
        """Sends a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def hear(self, timeout_s: float = READY_TIMEOUT_S) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            return (await self._process.stdout.readline()).decode().strip()


async def located(master: str, keys: bytes) -> int:
    """How many leading blocks the master at this address knows of."""
    async with grpc.aio.insecure_channel(master) as channel:
        stub: Any = master_pb2_grpc.MasterStub(channel)
        request = master_pb2.LocateRequest(keys=keys)
        return int((await stub.Locate(request, timeout=HEAL_TIMEOUT_S)).found)


class Observer:
    """Asks a node for its accounts, on a channel of its own."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def stats(self) -> node_pb2.StatsResponse:
        """Space and counters."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            stub: Any = node_pb2_grpc.NodeStub(channel)
            request = node_pb2.StatsRequest()
            return await stub.Stats(request, timeout=HEAL_TIMEOUT_S)  # type: ignore[no-any-return]

    async def idle(self, timeout_s: float = HEAL_TIMEOUT_S) -> node_pb2.StatsResponse:
        """Nobody holds anything and nothing is under way: I6, every byte is free or of a block."""
        deadline = time.monotonic() + timeout_s
        while True:
            stats = await self.stats()
            held = [tier.pending_bytes + tier.quarantined_bytes for tier in stats.tiers]
            if not (stats.pinned_blocks or any(held)):
                break
            assert time.monotonic() < deadline, f"still held after {timeout_s:g} s: {stats}"
            await asyncio.sleep(0.005)
        for tier in stats.tiers:
            assert tier.free_bytes + tier.live_bytes == tier.capacity_bytes, tier
        return stats
