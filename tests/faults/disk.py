"""A node in this process and one session with it, without sockets: for faults of the disk."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from kvstore.core.effects import Body, Committed, End, Failed, Granted, Reply, Reserved
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, EndReason, Namespace, ReserveStatus, SlotRun, Tier
from kvstore.node.node import Node
from kvstore.node.settings import NodeConfig

from tests.faults.content import content
from tests.faults.ledger import Ledger
from tests.node.rig import until

BLOCK_BYTES = 4096
SESSION = 1
NODE_ID = "faults"
ANSWER_TIMEOUT_S = 30.0
READS_AT_ONCE = 16
SPEC = CacheSpec.raw("faults", block_bytes=BLOCK_BYTES)


@dataclass
class Got:
    """Blocks of the leading keys that were hits, and why there are no more."""

    blocks: list[bytes]
    reason: EndReason


class DiskNode:
    """Made, used and closed on one event loop; what it is asked goes into the ledger."""

    def __init__(self, folder: Path, ledger: Ledger, **settings: Any) -> None:
        """``folder`` has the node's directories; KVStoreError if the node does not start."""
        defaults: dict[str, Any] = {
            "data_dir": folder / "node",
            "pool_dir": folder,
            "node_id": NODE_ID,
            "dram": 2 << 20,
            "ssd": 8 << 20,
            "scrub_mb_s": 0.0,
        }
        self.ledger = ledger
        self.node = Node(NodeConfig(**{**defaults, **settings}))
        self.core, self.driver = self.node.core, self.node.driver
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[Body]] = {}
        self.driver.sinks[SESSION] = self._hear
        self.core.open_session(SESSION)
        self.namespace: Namespace

    async def __aenter__(self) -> Self:
        self.namespace = await self.node.open_namespace(SPEC, "", SESSION)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.driver.apply(self.core.session_settled(SESSION, self.driver.now()))
        await self.node.close()

    def _hear(self, reply: Reply) -> None:
        self._answers[reply.request_id].put_nowait(reply.body)

    def _request(self) -> int:
        number = next(self._ids)
        self._answers[number] = asyncio.Queue()
        return number

    async def _answer(self, number: int) -> Body:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            body = await self._answers[number].get()
        if isinstance(body, Failed):
            raise body.error
        return body

    async def put(
        self,
        keys: Sequence[bytes],
        level: AckLevel = AckLevel.SYNCED,
        *,
        version: int = 0,
        timeout_s: float = 5.0,
    ) -> bytes:
        """Stores a chain; a ReserveStatus for each block that got no slot, else 16 + the level."""
        for key in keys:
            self.ledger.issue(key, version)
        reserve = self._request()
        joined = b"".join(keys)
        args = (SESSION, reserve, self.namespace.id, joined, b"", timeout_s, self.driver.now())
        self.driver.apply(self.core.reserve(*args))
        reserved = await self._answer(reserve)
        assert isinstance(reserved, Reserved)
        indices, sums = [], b""
        for index, place in _places(reserved.runs):
            data = content(self.ledger.seed, "default", keys[index], version, BLOCK_BYTES)
            self.node.pool.map.memory[place : place + BLOCK_BYTES] = data
            sums += xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
            indices.append(index)
        outcome = bytearray(reserved.statuses)
        if not indices:
            return bytes(outcome)
        commit = self._request()
        now = self.driver.now()
        args_of = (SESSION, commit, reserve, np.array(indices, dtype=np.int64), sums, level, now)
        self.driver.apply(self.core.commit(*args_of))
        committed = await self._answer(commit)
        assert isinstance(committed, Committed)
        for index, reached in zip(indices, committed.levels, strict=True):
            outcome[index] = 16 + reached
            self.ledger.acknowledge(keys[index], AckLevel(reached))
        return bytes(outcome)

    async def get(self, keys: Sequence[bytes], *, timeout_s: float = 10.0) -> Got:
        """Reads the leading blocks of a chain, and has the ledger judge them."""
        number = self._request()
        joined = b"".join(keys)
        args = (SESSION, number, self.namespace.id, joined, b"", timeout_s, self.driver.now())
        self.driver.apply(self.core.acquire(*args))
        blocks: list[bytes] = []
        while not isinstance(body := await self._answer(number), End):
            assert isinstance(body, Granted)
            for _, place in _places(body.runs):
                blocks.append(bytes(self.node.pool.map.memory[place : place + BLOCK_BYTES]))
        for key, data in zip(keys, blocks, strict=False):
            self.ledger.read(key, data)
        self.driver.apply(self.core.release(SESSION, number, 0, 0, self.driver.now()))
        return Got(blocks, body.reason)

    async def find(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of these keys, each the first of its chain, that are hits."""
        found = set()
        for first in range(0, len(keys), READS_AT_ONCE):
            some = keys[first : first + READS_AT_ONCE]
            got = await asyncio.gather(*(self.get([key]) for key in some))
            found |= {key for key, one in zip(some, got, strict=True) if one.blocks}
        return found

    def forget_dram(self) -> None:
        """Leaves in DRAM only what is nowhere else."""
        effects, _ = self.core.evict(Tier.DRAM, b"", 0, False, self.driver.now())
        self.driver.apply(effects)

    def remove(self, keys: Sequence[bytes]) -> None:
        """Removes blocks from both tiers; they need not be there any more."""
        for key in keys:
            self.ledger.acked.pop(key, None)
        for tier in (Tier.SSD, Tier.DRAM) if keys else ():
            effects, _ = self.core.evict(tier, b"".join(keys), 0, True, self.driver.now())
            self.driver.apply(effects)

    async def idle(self) -> None:
        """Nothing waits, and the accounts add up."""
        await until(self.core.idle, ANSWER_TIMEOUT_S)
        self.core.check_integrity()


def full(outcome: bytes) -> bool:
    """Whether a block of a put was refused for want of space."""
    return ReserveStatus.FULL in outcome


def reached(outcome: bytes, level: AckLevel) -> bool:
    """Whether every block of a put was acknowledged at exactly this level."""
    return all(one == 16 + level for one in outcome)


def _places(runs: Sequence[SlotRun]) -> list[tuple[int, int]]:
    """(index, offset in the pool) of each block in the runs."""
    return [(run.first + i, run.offset + i * run.stride) for run in runs for i in range(run.count)]
