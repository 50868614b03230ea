"""Real master and real nodes, killed: the index says what the nodes hold, neither more nor less."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from kvstore_client import AckLevel, CacheSpec, Client
from kvstore_proto import admin_pb2, admin_pb2_grpc, master_pb2, master_pb2_grpc

from tests.cli.store import DEADLINE_S, short_directory, until

BLOCK_BYTES = 64 << 10
SPEC = CacheSpec.raw("recovery", block_bytes=BLOCK_BYTES, block_tokens=4)
KILLS = 6


class Daemon:
    """One daemon process that can be killed and started again."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        self.command = [sys.executable, "-m", f"kvstore.{name}.daemon", *arguments]
        self.command += ["--log-level", "error", "--metrics-listen", ""]
        self.start()

    def start(self) -> str:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(f"kvstore-{self.name} ready: "), line
        self.address = line.split()[-1]
        return self.address

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Pair:
    """A master and one node of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.master = Daemon("master", "--data-dir", f"{directory}/m", "--listen", "127.0.0.1:0")
        # Once it has a port it keeps it, so that the node finds it again.
        listen = self.master.command.index("127.0.0.1:0")
        self.master.command[listen] = self.master.address
        self.node = self.new_node("n")

    def new_node(self, name: str) -> Daemon:
        data_dir = f"{self.directory}/{name}"
        tiers = ["--dram", "4MiB", "--ssd", "8MiB", "--pool-dir", str(self.directory)]
        return Daemon("node", "--data-dir", data_dir, *tiers, "--master", self.master.address)

    def call(self, stub: Any, method: str, request: Any) -> Any:
        """One call on a channel of its own; None while the master is away."""
        with grpc.insecure_channel(self.master.address) as channel:
            try:
                return getattr(stub(channel), method)(request, timeout=DEADLINE_S)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return None
                raise

    def found(self, keys: list[bytes]) -> int:
        request = master_pb2.LocateRequest(keys=b"".join(keys))
        answer = self.call(master_pb2_grpc.MasterStub, "Locate", request)
        return -1 if answer is None else int(answer.found)

    def indexed(self) -> int:
        answer = self.call(admin_pb2_grpc.AdminStub, "Status", admin_pb2.StatusRequest())
        return -1 if answer is None else int(answer.indexed_blocks)

    def held(self, client: Client) -> int:
        """Blocks that the node itself counts, all its tiers."""
        return sum(usage.blocks for usage in client.stats().tiers)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with short_directory() as directory:
        made = Pair(directory)
        try:
            yield made
        finally:
            for daemon in (made.master, made.node):
                with contextlib.suppress(ValueError):
                    daemon.kill()


def prompt(number: int) -> list[int]:
    return [number] * 32


def test_I8_killed_masters_neither_lose_nor_invent_a_block(pair: Pair) -> None:
    seed = int(os.environ.get("KVSTORE_TEST_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"KVSTORE_TEST_SEED={seed}")
    rng = random.Random(seed)
    data = np.zeros(8 * BLOCK_BYTES, dtype=np.uint8)
    with Client.connect(pair.node.address, name="test") as client:
        ns = client.open_namespace(SPEC)
        written = 0
        for _ in range(KILLS):
            # More than DRAM and SSD hold: blocks leave both all along.
            for _ in range(rng.randrange(5, 15)):
                ns.put(ns.keys(prompt(written)), data, timeout_s=10)
                written += 1
            pair.master.kill()
            ns.put(ns.keys(prompt(written)), data, level=AckLevel.SYNCED, timeout_s=10)
            written += 1
            pair.master.start()
        until(lambda: pair.indexed() == pair.held(client) > 0)
        counts = [pair.found(ns.keys(prompt(n))) for n in range(written)]
        matched = [ns.match(ns.keys(prompt(n))).count for n in range(written)]
    assert counts == matched
    assert 8 in counts
    assert 0 in counts, "the tiers were not filled"


def test_I9_blocks_of_a_killed_node_are_gone_at_once_and_back_with_it(pair: Pair) -> None:
    data = np.zeros(8 * BLOCK_BYTES, dtype=np.uint8)
    with Client.connect(pair.node.address, name="test") as client:
        ns = client.open_namespace(SPEC)
        keys = list(ns.keys(prompt(1)))
        ns.put(keys, data, level=AckLevel.SYNCED, timeout_s=10)
        until(lambda: pair.found(keys) == 8)
        pair.node.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: pair.found(keys) == 0)
        assert time.monotonic() - killed < 1.0
    pair.node.kill()
    pair.node.start()
    until(lambda: pair.found(keys) == 8)


def test_I9_a_stopped_master_does_not_take_its_nodes_for_lost(pair: Pair) -> None:
    data = np.zeros(8 * BLOCK_BYTES, dtype=np.uint8)
    with Client.connect(pair.node.address, name="test") as client:
        ns = client.open_namespace(SPEC)
        keys = list(ns.keys(prompt(1)))
        ns.put(keys, data, timeout_s=10)
        until(lambda: pair.found(keys) == 8)
        pair.master.process.send_signal(signal.SIGSTOP)
        time.sleep(2.6)  # longer than two heartbeats: the fault itself
        pair.master.process.send_signal(signal.SIGCONT)
        assert pair.found(keys) == 8
        metrics = pair.call(admin_pb2_grpc.AdminStub, "Status", admin_pb2.StatusRequest())
        assert (metrics.nodes_ready, metrics.nodes_lost) == (1, 0)
