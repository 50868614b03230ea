"""Reading: blocks pinned for the time of an ``async with``."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from kvstore.core.types import EndReason

from kvstore_client.views import SlotViews

if TYPE_CHECKING:
    import torch

    from kvstore_client.lease import Lease
    from kvstore_client.namespace import Namespace
    from kvstore_client.wire import Keys


class Read:
    """The leading blocks of a chain that the node has, pinned and in DRAM until the exit.

    ``count`` blocks were found; ``reason`` says why not more. A view outlives its pin only as
    memory: after the exit it shows whatever the node puts there next.
    """

    def __init__(
        self, namespace: Namespace, keys: Keys, parent: bytes | None, timeout_s: float | None
    ) -> None:
        self._namespace = namespace
        self._arguments = (keys, parent, timeout_s)
        self._lease: Lease | None = None

    async def __aenter__(self) -> Self:
        self._lease = await self._namespace.acquire(*self._arguments)
        try:
            await self._lease.wait()
        except BaseException:
            self._lease.release()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.lease.release()

    @property
    def lease(self) -> Lease:
        """What holds the blocks."""
        assert self._lease is not None, "use it as `async with namespace.read(keys) as read:`"
        return self._lease

    @property
    def count(self) -> int:
        """Blocks found."""
        return self.lease.granted

    @property
    def reason(self) -> EndReason:
        """Why the prefix ended there; COMPLETE if every block was found."""
        return self.lease.reason or EndReason.UNSPECIFIED

    @property
    def sources(self) -> npt.NDArray[np.uint8]:
        """The tier of each block when it was asked for."""
        return self.lease.sources[: self.count]

    @property
    def blocks(self) -> SlotViews:
        """The blocks as read-only memoryviews, without a copy."""
        return self.lease.blocks

    def array(
        self, index: int, dtype: npt.DTypeLike = np.uint8, shape: tuple[int, ...] = (-1,)
    ) -> npt.NDArray[Any]:
        """Block ``index`` as a read-only array, without a copy."""
        return self.blocks.array(index, dtype, shape)

    def tensor(
        self, index: int, dtype: torch.dtype | None = None, shape: tuple[int, ...] = (-1,)
    ) -> torch.Tensor:
        """Block ``index`` as a tensor, without a copy; do not write to it."""
        return self.blocks.tensor(index, dtype, shape)

    def copy_into(self, out: Any) -> int:
        """Copies the blocks to ``out``, one after the other, or each into its own of a list.

        Returns how many; raises UnavailableError if they were lost meanwhile.
        """
        return self.lease.copy_into(out)

    def still_valid(self) -> bool:
        """Whether the blocks are still what was granted; ask after using them."""
        return self.lease.still_valid()
