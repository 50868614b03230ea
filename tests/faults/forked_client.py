"""Client processes that cost a fork: ``python -m tests.faults.forked_client ADDRESS``.

Each line on stdin, ``STAGE SEED``, makes a child with a session of its own. It goes as far as the
stage, prints ``PID``, and stays there until it is killed; at the stage ``free`` it prints its PID
first and then stores chains without a pause. What it stores is a function of the seed.
"""

import ctypes
import mmap
import os
import queue
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import grpc
import xxhash
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel
from kvstore.node import translate
from kvstore_client.process import this_process
from kvstore_proto import node_pb2, node_pb2_grpc

from tests.faults.content import content

BLOCK_BYTES = 4096
CHAIN_BLOCKS = 6
COMMITTED_BLOCKS = 3  # of the chain, at the stage ``committed``
FREE_CHAINS = 8
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
SPEC = CacheSpec.raw("forked", block_bytes=BLOCK_BYTES)
STAGES = ("greeted", "reserved", "copying", "copied", "committing", "committed", "free")


def keys_of(seed: int, chain: int = 0) -> list[bytes]:
    """Keys of the chains of a child."""
    make = random.Random(seed << 8 | chain).randbytes
    return [make(32) for _ in range(CHAIN_BLOCKS)]


def data_of(key: bytes) -> bytes:
    """Their bytes."""
    return content(0, "default", key, 0, BLOCK_BYTES)


class Session:
    """A session without a client library: request, answer."""

    def __init__(self, address: str) -> None:
        self._requests: queue.SimpleQueue[node_pb2.SessionRequest] = queue.SimpleQueue()
        self._last = 0
        stub: Any = node_pb2_grpc.NodeStub(grpc.insecure_channel(address))
        self._answers: Iterator[node_pb2.SessionResponse] = stub.Session(
            iter(self._requests.get, None)
        )
        own = this_process()
        hello = node_pb2.Hello(
            protocol_version=2,
            client_id=os.urandom(8).hex(),
            pid=own.pid,
            pid_namespace=own.pid_namespace,
            process_start_ticks=own.start_ticks,
            settled=True,
        )
        welcome = self.call(hello=hello).welcome
        with open(welcome.pool_path, "r+b") as file:
            self.pool = mmap.mmap(file.fileno(), welcome.pool_bytes)
        opening = node_pb2.OpenNamespace(spec=translate.spec_to_message(SPEC))
        self.namespace = self.call(open_namespace=opening).namespace_opened.namespace_id

    def send(self, **request: Any) -> int:
        """Sends a request; its id."""
        self._last += 1
        self._requests.put(node_pb2.SessionRequest(id=self._last, **request))
        return self._last

    def call(self, **request: Any) -> node_pb2.SessionResponse:
        """Sends a request and waits for its answer."""
        self.send(**request)
        return next(self._answers)

    def reserve(self, keys: Sequence[bytes]) -> tuple[int, list[int]]:
        """(id, offsets of the slots)"""
        reserve = node_pb2.Reserve(namespace_id=self.namespace, keys=b"".join(keys))
        reserved = self.call(reserve=reserve).reserved
        assert reserved.statuses == b"\1" * len(keys), reserved
        offsets = [run.offset + i * run.stride for run in reserved.runs for i in range(run.count)]
        return self._last, offsets

    def fill(self, offset: int, data: bytes) -> None:
        """Copies into a slot."""
        self.pool[offset : offset + len(data)] = data

    @staticmethod
    def commit_of(reserve_id: int, keys: Sequence[bytes], level: AckLevel) -> node_pb2.Commit:
        """The commit of the leading keys of a reserve."""
        sums = [xxhash.xxh3_64_intdigest(data_of(key)).to_bytes(8, "little") for key in keys]
        return node_pb2.Commit(
            reserve_id=reserve_id,
            indices=range(len(keys)),
            checksums=b"".join(sums),
            level=translate.number(level),
        )


def stay() -> NoReturn:
    """Says where it is, and waits to be killed."""
    os.write(1, b"%d\n" % os.getpid())
    while True:
        signal.pause()


def live(address: str, stage: str, seed: int) -> NoReturn:
    """The life of a child, which ends with its parent's."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    session = Session(address)
    if stage == "greeted":
        stay()
    if stage == "free":
        os.write(1, b"%d\n" % os.getpid())
        for chain in range(FREE_CHAINS):
            store(session, keys_of(seed, chain))
        while True:
            signal.pause()
    keys = keys_of(seed)
    reserve_id, offsets = session.reserve(keys)
    if stage == "reserved":
        stay()
    for i, (key, offset) in enumerate(zip(keys, offsets, strict=True)):
        if stage == "copying" and i == CHAIN_BLOCKS // 2:
            session.fill(offset, data_of(key)[: BLOCK_BYTES // 2])
            stay()
        session.fill(offset, data_of(key))
    if stage == "committing":
        session.send(commit=session.commit_of(reserve_id, keys, AckLevel.SYNCED))
    elif stage == "committed":
        some = keys[:COMMITTED_BLOCKS]
        session.call(commit=session.commit_of(reserve_id, some, AckLevel.MEMORY))
    stay()


def store(session: Session, keys: Sequence[bytes]) -> None:
    """Stores one chain."""
    reserve_id, offsets = session.reserve(keys)
    for key, offset in zip(keys, offsets, strict=True):
        session.fill(offset, data_of(key))
    session.call(commit=session.commit_of(reserve_id, keys, AckLevel.MEMORY))


def main(address: str) -> None:
    """Forks a child a line, until the end of the input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        stage, seed = line.split()
        if os.fork() == 0:
            try:
                live(address, stage, int(seed))
            finally:
                os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
