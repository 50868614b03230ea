"""A namespace: one CacheSpec of one tenant, and everything that can be done with its blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping as Mapped
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from kvstore.core.keys import TokenIds, block_keys, salt_extra
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel
from kvstore.errors import InvalidArgumentError
from kvstore_proto import node_pb2

from kvstore_client.bulk import Got, Put, get, put
from kvstore_client.lease import Lease
from kvstore_client.reading import Read
from kvstore_client.wire import Keys, joined_keys, spec_message, wait_ms
from kvstore_client.writing import Shard, Write

if TYPE_CHECKING:
    from kvstore_client.client import AsyncClient
    from kvstore_client.session import Session

_HBM_KEYS_MAX = 8192  # in one message


@dataclass(frozen=True, slots=True)
class Match:
    """The leading blocks that the node had when it was looked at: a hint until acquired."""

    count: int
    tiers: npt.NDArray[np.uint8]  # fastest Tier of each


class Namespace:
    """Opened by ``AsyncClient.open_namespace``; stays good over a reconnection of the client."""

    def __init__(self, client: AsyncClient, spec: CacheSpec, tenant: str) -> None:
        self.spec = spec
        self.tenant = tenant
        self.id = 0
        self.root = b""
        self._client = client

    @property
    def copy_turn(self) -> asyncio.Lock:
        """Whose put copies now, in this client."""
        return self._client.copy_turn

    async def open(self) -> None:
        """Asks the node for the id and the root."""
        self.take(await self.ask(self._client.session))

    async def ask(self, session: Session) -> node_pb2.NamespaceOpened:
        """What the node at the other end of ``session`` knows it as; the client asks for every
        new session, before that is anybody's.
        """
        opening = node_pb2.OpenNamespace(spec=spec_message(self.spec), tenant=self.tenant)
        request = node_pb2.SessionRequest(open_namespace=opening)
        answer = await session.call(request, self._client.timeout_s)
        return answer.namespace_opened

    def take(self, opened: node_pb2.NamespaceOpened) -> None:
        """From now on it is this one."""
        self.id, self.root = opened.namespace_id, opened.root

    def keys(
        self,
        tokens: TokenIds,
        cache_salt: str | None = None,
        extra: Mapped[int, Sequence[bytes]] | None = None,
    ) -> list[bytes]:
        """Keys of the full blocks of a prompt; ``extra`` maps block index to extra keys."""
        extras = dict(salt_extra(cache_salt))
        for index, items in (extra or {}).items():
            extras[index] = [*extras.get(index, ()), *items]
        return block_keys(self.root, tokens, self.spec.block_tokens, extras)

    def match(self, keys: Keys) -> Match:
        """Looks the chain up in the node's directory: no call, from any thread.

        Raises UnavailableError while the session is lost.
        """
        self._client.check_open()
        tiers = self._client.mapping.directory.match(joined_keys(keys))
        return Match(len(tiers), tiers)

    async def acquire(
        self, keys: Keys, parent: bytes | None = None, timeout_s: float | None = None
    ) -> Lease:
        """Asks for the leading blocks of ``keys``; returns at once, see ``Lease.wait``.

        ``timeout_s`` bounds how long blocks that are not in DRAM may take, 0 takes only what DRAM
        has. Release the lease in every case.
        """
        client = self._client
        client.check_open()
        joined = joined_keys(keys)
        limit = client.timeout_s if timeout_s is None else timeout_s
        request = node_pb2.Acquire(
            namespace_id=self.id, keys=joined, parent=parent or b"", timeout_ms=wait_ms(limit)
        )
        nbytes = self.spec.block_bytes
        lease = Lease(client.session, client.mapping, len(joined) // 32, nbytes)
        lease.start(request, limit or client.timeout_s, client.hold())
        await asyncio.sleep(0)  # lets the request leave before the caller goes on with a copy
        return lease

    def read(self, keys: Keys, parent: bytes | None = None, timeout_s: float | None = None) -> Read:
        """``async with ns.read(keys) as read``: the leading blocks, pinned until the exit."""
        return Read(self, keys, parent, timeout_s)

    def write(
        self,
        keys: Keys,
        parent: bytes | None = None,
        level: AckLevel = AckLevel.MEMORY,
        timeout_s: float | None = None,
        shard: Shard = Shard(),  # noqa: B008  (immutable)
    ) -> Write:
        """``async with ns.write(keys) as write``: slots to fill and commit.

        ``timeout_s`` bounds the wait for space, and each commit.
        """
        client = self._client
        client.check_open()
        shard.check(self.spec.block_bytes)
        request = node_pb2.Reserve(
            namespace_id=self.id,
            keys=joined_keys(keys),
            parent=parent or b"",
            shard_index=shard.index,
            num_shards=shard.count,
            level=int(level),  # type: ignore[arg-type]
        )
        limit = client.timeout_s if timeout_s is None else timeout_s
        return Write(client, request, self.spec.block_bytes, level=level, timeout_s=limit)

    async def put(
        self,
        keys: Keys,
        data: Any,
        parent: bytes | None = None,
        level: AckLevel = AckLevel.MEMORY,
        timeout_s: float | None = None,
    ) -> Put:
        """Stores the blocks of a chain from ``data``: one buffer, or a list of one a block."""
        return await put(self, keys, data, parent, level, timeout_s)

    async def get(
        self, keys: Keys, out: Any, parent: bytes | None = None, timeout_s: float | None = None
    ) -> Got:
        """Copies the leading blocks of a chain to ``out``: one buffer, or a list of one a block."""
        return await get(self, keys, out, parent, timeout_s)

    async def prefetch(self, keys: Keys, parent: bytes | None = None) -> int:
        """Starts loading blocks into DRAM without pinning them; how many were started."""
        request = node_pb2.Prefetch(
            namespace_id=self.id, keys=joined_keys(keys), parent=parent or b""
        )
        answer = await self._client.session.call(
            node_pb2.SessionRequest(prefetch=request), self._client.timeout_s
        )
        return answer.prefetched.started

    def hbm_events(self, stored: Keys = b"", removed: Keys = b"", *, cleared: bool = False) -> None:
        """Tells which blocks came into and left this engine's own pages; needs no answer."""
        if not self._client.engine_id:
            raise InvalidArgumentError("HBM events need a client with an engine_id")
        session = self._client.session
        gone, come = joined_keys(removed), joined_keys(stored)
        size = _HBM_KEYS_MAX * 32
        for at in range(0, max(len(gone), len(come), 1), size):
            events = node_pb2.HbmEvents(
                namespace_id=self.id,
                stored=come[at : at + size],
                removed=gone[at : at + size],
                cleared=cleared and at == 0,
            )
            session.post(node_pb2.SessionRequest(id=session.next_id(), hbm_events=events))
