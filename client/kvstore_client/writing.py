"""Writing: slots to fill, and the commit that makes them visible."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from kvstore.core.types import AckLevel, ReserveStatus
from kvstore.errors import InternalError, InvalidArgumentError, PreconditionError, UnavailableError
from kvstore_proto import node_pb2

from kvstore_client.copying import as_bytes, checksum, scatter, scatter_one
from kvstore_client.streaming import Bytes
from kvstore_client.views import SlotViews
from kvstore_client.wire import wait_ms

if TYPE_CHECKING:
    from kvstore_client.client import AsyncClient

Indices = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of every block this client fills."""

    index: int = 0
    count: int = 1

    def check(self, block_bytes: int) -> None:
        """InvalidArgumentError where blocks of that size have no such part."""
        if not 0 <= self.index < self.count:
            raise InvalidArgumentError(f"shard {self.index} of {self.count}: there is none")
        if block_bytes % self.count:
            raise InvalidArgumentError(f"{block_bytes} bytes do not split into {self.count} shards")


def drop(answer: asyncio.Future[node_pb2.SessionResponse]) -> None:
    """Lets go of an answer that nobody will wait for."""
    if answer.done() and not answer.cancelled():
        answer.exception()  # else asyncio complains that nobody looked
    answer.cancel()


class PendingCommit:
    """A commit on its way."""

    def __init__(
        self,
        chosen: npt.NDArray[np.int64],
        answer: asyncio.Future[node_pb2.SessionResponse] | None,
    ) -> None:
        self.chosen = chosen  # indices of the blocks
        self._answer = answer

    async def levels(self) -> npt.NDArray[np.uint8]:
        """The AckLevel reached for each block, 0 where it failed."""
        if self._answer is None:
            return np.zeros(0, dtype=np.uint8)
        levels = (await self._answer).committed.levels
        if len(levels) != len(self.chosen):
            raise InternalError(f"{len(levels)} levels for {len(self.chosen)} blocks")
        return np.frombuffer(levels, dtype=np.uint8)

    def drop(self) -> None:
        """Nobody will ask for the levels."""
        if self._answer is not None:
            drop(self._answer)


class Write:
    """Reserved slots, for the time of an ``async with``; what is not committed is given back.

    ``statuses`` has one ReserveStatus a key: only SLOT is to be filled. ``level`` is what a commit
    waits for. Filling may be done in any thread, all else belongs to the session's loop.
    """

    def __init__(
        self,
        client: AsyncClient,
        request: node_pb2.Reserve,
        block_bytes: int,
        *,
        level: AckLevel,
        timeout_s: float,
    ) -> None:
        self.level = level
        self.count = count = len(request.keys) // 32
        self.statuses: npt.NDArray[np.uint8] = np.zeros(count, dtype=np.uint8)
        self.nbytes = block_bytes // request.num_shards
        self._shift = request.shard_index * self.nbytes
        self._offsets: npt.NDArray[np.int64] = np.full(count, -1, dtype=np.int64)
        self._generations: npt.NDArray[np.uint32] = np.zeros(count, dtype=np.uint32)
        self._open: npt.NDArray[np.bool_] = np.zeros(count, dtype=np.bool_)
        self._digests: npt.NDArray[np.uint64] = np.zeros(count, dtype=np.uint64)
        self._hashed: npt.NDArray[np.bool_] = np.zeros(count, dtype=np.bool_)
        self._client = client
        self._session = client.session
        self._pool = client.mapping.pool
        self._directory = client.mapping.directory
        self._request = node_pb2.SessionRequest(reserve=request)
        self._timeout_s = timeout_s
        self._closed: Callable[[], None] | None = None
        self._reserving: asyncio.Future[node_pb2.SessionResponse] | None = None
        self._views = SlotViews(self._pool, self._offsets, self.nbytes, write=True)

    async def __aenter__(self) -> Self:
        self.begin()
        return await self.begun()

    def begin(self) -> None:
        """Asks for the slots; ``begun`` waits for them, and ``__aexit__`` follows in any case."""
        self._request.reserve.timeout_ms = wait_ms(self._timeout_s)
        self._reserving = self._ask(self._request)
        self._closed = self._client.hold()

    async def begun(self) -> Self:
        """Waits for the slots that ``begin`` asked for."""
        assert self._reserving is not None, "begin first"
        try:
            self._take((await self._reserving).reserved)
        except BaseException:
            # The answer may be on its way: whatever was reserved goes back.
            self._give_up()
            raise
        self._reserving = None
        return self

    def _ask(self, request: node_pb2.SessionRequest) -> asyncio.Future[node_pb2.SessionResponse]:
        return self._session.ask(request, self._timeout_s or self._client.timeout_s)

    def _give_up(self) -> None:
        if self._reserving is not None:
            drop(self._reserving)
            self._reserving = None
        self._post_abort()
        self._close()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._reserving is not None or self._open.any():
            self._give_up()
        self._close()

    def _take(self, reserved: node_pb2.Reserved) -> None:
        if len(reserved.statuses) != self.count:
            raise InternalError(f"{len(reserved.statuses)} statuses for {self.count} keys")
        statuses = np.frombuffer(reserved.statuses, dtype=np.uint8)
        generations = np.frombuffer(reserved.generations, dtype="<u4")
        if len(generations) != sum(run.count for run in reserved.runs):
            raise InternalError(f"{len(generations)} generations, not one for each slot")
        for run in reserved.runs:
            end = run.first + run.count
            last = run.offset + (run.count - 1) * run.stride + self._shift + self.nbytes
            if end > self.count or last > len(self._pool):
                raise InternalError(f"slots {run.first}+{run.count} at {run.offset}: out of range")
            start = run.offset + self._shift
            self._offsets[run.first : end] = start + run.stride * np.arange(run.count)
            self._generations[run.first : end] = generations[: run.count]
            generations = generations[run.count :]
        to_fill = statuses == ReserveStatus.SLOT
        if (self._offsets[to_fill] < 0).any():
            raise InternalError("the node reserved a block without saying where")
        self.statuses[:] = statuses
        self._open[:] = to_fill
        self._views.grow(self.count)

    @property
    def slots(self) -> list[tuple[int, memoryview]]:
        """Index into the keys and slot, for every block that is still to be filled."""
        return [(index, self._views[index]) for index in np.flatnonzero(self._open).tolist()]

    def array(
        self, index: int, dtype: npt.DTypeLike = np.uint8, shape: tuple[int, ...] = (-1,)
    ) -> npt.NDArray[Any]:
        """The slot of block ``index`` as an array to fill."""
        self._chosen([index])
        return self._views.array(index, dtype, shape)

    def put(self, index: int, data: Any) -> None:
        """Copies ``data`` (array, tensor or buffer) into the slot of block ``index``.

        Raises UnavailableError if the slot is another's by now, which only the loss of the session
        allows.
        """
        self._chosen([index])
        self._check_kept(index, index + 1)
        source = as_bytes(data)
        if len(source) != self.nbytes:
            raise InvalidArgumentError(
                f"{len(source)} bytes for block {index}; a block has {self.nbytes}"
            )
        self._digests[index] = scatter_one(self._views.bytes_at(index), source)
        self._hashed[index] = True

    def put_range(self, first: int, data: Bytes) -> None:
        """Copies consecutive blocks of ``data`` to the slots of blocks ``first`` …

        Blocks that have no slot, for whatever reason, are passed over. Raises as ``put`` does.
        """
        end = first + len(data) // self.nbytes
        if self._open[first:end].all():
            self._check_kept(first, end)
            offsets = self._offsets[first:end]
            self._digests[first:end] = scatter(self._pool, offsets, self.nbytes, data)
            self._hashed[first:end] = True
            return
        for index in (first + np.flatnonzero(self._open[first:end])).tolist():
            at = (index - first) * self.nbytes
            self.put(index, data[at : at + self.nbytes])

    def _check_kept(self, first: int, end: int) -> None:
        now = self._directory.generations_at(self._offsets[first:end] - self._shift)
        if not np.array_equal(now, self._generations[first:end]):
            raise UnavailableError("the session was lost, and its slots with it: nothing is copied")

    def _chosen(self, indices: Indices | None) -> npt.NDArray[np.int64]:
        """``indices``, or all that are open; PreconditionError if one of them is not."""
        if indices is None:
            return np.flatnonzero(self._open)
        chosen = np.asarray(indices, dtype=np.int64)
        known = (chosen >= 0) & (chosen < self.count)
        known[known] = self._open[chosen[known]]
        if not known.all():
            raise PreconditionError(
                f"block {chosen[~known][0]} has no open slot: "
                "it was not reserved, or is committed already"
            )
        return chosen

    async def commit(self, indices: Indices | None = None) -> npt.NDArray[np.uint8]:
        """Makes blocks visible: ``indices``, or all that were reserved.

        Returns the AckLevel reached for each, 0 where it failed. After an error they may be
        visible or not.
        """
        return await self.begin_commit(indices).levels()

    def begin_commit(self, indices: Indices | None = None) -> PendingCommit:
        """Sends the commit; its ``levels`` waits for it."""
        chosen = self._chosen(indices)
        if not len(chosen):
            return PendingCommit(chosen, None)
        for index in chosen[~self._hashed[chosen]].tolist():
            self._digests[index] = checksum(self._views.bytes_at(index))
        commit = node_pb2.Commit(
            reserve_id=self._request.id,
            indices=chosen.tolist(),
            checksums=self._digests[chosen].astype("<u8").tobytes(),
            level=int(self.level),  # type: ignore[arg-type]
        )
        answer = self._ask(node_pb2.SessionRequest(commit=commit))
        self._open[chosen] = False
        return PendingCommit(chosen, answer)

    async def abort(self, indices: Indices | None = None) -> int:
        """Gives slots back unfilled, all that are open if None; how many, once they are free."""
        chosen = self._chosen(indices)
        if not len(chosen):
            return 0
        abort = node_pb2.Abort(reserve_id=self._request.id, indices=chosen.tolist())
        answer = self._ask(node_pb2.SessionRequest(abort=abort))
        self._open[chosen] = False
        return (await answer).aborted.count

    def _post_abort(self) -> None:
        abort = node_pb2.Abort(reserve_id=self._request.id)
        self._session.post(node_pb2.SessionRequest(id=self._session.next_id(), abort=abort))

    def _close(self) -> None:
        if (closed := self._closed) is not None:
            self._closed = None
            self._open[:] = False
            self._views.close()
            closed()
