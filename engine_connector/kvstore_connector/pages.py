"""The engine's page storage as rows of bytes, so that a block moves as one copy."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from kvstore.errors import InvalidArgumentError

Bytes = npt.NDArray[np.uint8]


class PageRows:
    """Page i is row i: ``page_bytes`` contiguous bytes in the canonical block order.

    numpy copies release the GIL, so that the engine loop goes on meanwhile.
    """

    def __init__(self, rows: Bytes, block_bytes: int) -> None:
        if rows.ndim != 2 or not rows.flags.c_contiguous or rows.shape[1] != block_bytes:
            raise InvalidArgumentError(
                f"pages of shape {rows.shape} are not rows of {block_bytes} contiguous bytes"
            )
        self.rows = rows
        self.page_bytes = block_bytes

    def spans(self, pages: Sequence[int]) -> Iterator[Bytes]:
        """The memory of ``pages``, in order; pages that follow each other are one piece.

        A piece is filled by one copy, which needs the GIL once and not once for each page.
        """
        start = 0
        for i in range(1, len(pages) + 1):
            if i == len(pages) or pages[i] != pages[i - 1] + 1:
                yield self.rows[pages[start] : pages[i - 1] + 1].reshape(-1)
                start = i

    def row(self, page: int) -> Bytes:
        """The bytes of one page."""
        row: Bytes = self.rows[page]
        return row
