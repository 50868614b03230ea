"""Proves that the pages of an LMDB file are sound before LMDB maps them, and reads damaged ones.

LMDB keeps no checksums and follows what its pages say: a flipped bit in one can crash the process
that reads it, or have a page in use overwritten later. So a node looks at every page first. What
is checked is LMDB's own format (version 1, of a little-endian 64-bit machine): both meta pages,
every page of every tree, the order of all keys, and that no page is used twice or used and free.
"""

import mmap
import struct
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.errors import CorruptError

META_MAGIC = 0xBEEFC0DE
FORMAT_VERSION = 1
PAGE_BYTES_MIN, PAGE_BYTES_MAX = 512, 65536
HEAD_BYTES = 16  # of a page: number, pad, flags, lower, upper
NODE_BYTES = 8  # of a node: sizes of data and key, flags; key and data follow
META_PAGES = 2
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8
BIG, SUB_TREE = 1, 2  # flags of a leaf's node
KEY_BYTES_MAX = 511
DEPTH_MAX = 32
TRANSACTION_MAX = 1 << 62
INTEGER_KEYS = 8  # flag of the tree of free pages
NO_ROOT = (1 << 64) - 1
READ_BYTES = 1 << 20

_META = struct.Struct("<16xIIQQ48s48sQQ")
_TREE = struct.Struct("<IHHQQQQQ")
Numbers = npt.NDArray[np.int64]


class Tree(NamedTuple):
    """What a meta page, or its parent tree, says about a tree."""

    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int


class Meta(NamedTuple):
    """One of the two meta pages; the one with the higher transaction counts."""

    page_bytes: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int


class _Nodes(NamedTuple):
    """All nodes of some pages, in order; ``at`` is where each begins in the file."""

    page: Numbers  # index into the pages asked for
    at: Numbers
    key_bytes: Numbers
    data_bytes: Numbers
    flags: Numbers


def read_metas(head: bytes) -> list[Meta]:
    """The two meta pages from the first bytes of a file; CorruptError if they are none."""
    metas = []
    start = 0
    for number in range(META_PAGES):
        page = head[start : start + _META.size]
        if len(page) < _META.size:
            raise CorruptError(f"meta page {number} is missing")
        magic, version, _, _, free, main, last_page, transaction = _META.unpack(page)
        flags = int.from_bytes(page[10:12], "little")
        if magic != META_MAGIC or version != FORMAT_VERSION or not flags & META:
            raise CorruptError(f"page {number} is no meta page of LMDB")
        tree = Tree(*_TREE.unpack(free))
        size = tree.pad
        if size & (size - 1) or not PAGE_BYTES_MIN <= size <= PAGE_BYTES_MAX:
            raise CorruptError(f"meta page {number} claims pages of {size} bytes")
        metas.append(Meta(size, tree, Tree(*_TREE.unpack(main)), last_page, transaction))
        start = size
    if metas[0].page_bytes != metas[1].page_bytes:
        raise CorruptError("the meta pages claim pages of different sizes")
    return metas


def _contents(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file as the system has them cached: they take no memory of this process."""
    with open(path, "rb", buffering=0) as file:
        piece = bytearray(READ_BYTES)
        while file.readinto(piece):  # what cannot be read is an OSError here, and a SIGBUS below
            pass
        nbytes = file.tell()
        if not nbytes:
            return np.zeros(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ), np.uint8)


class IndexPages:
    """The pages of an LMDB file, as bytes; nothing of them is trusted."""

    def __init__(self, path: Path, page_bytes: int, bytes_min: int = 0) -> None:
        """Reads the whole file; OSError if that fails. Up to ``bytes_min`` zeros follow it.

        Nobody may make the file shorter while this lives.
        """
        raw = _contents(path)
        self._file_bytes = len(raw)
        missing = max(-len(raw) % page_bytes, bytes_min - len(raw))
        self.bytes = np.concatenate((raw, np.zeros(missing, np.uint8))) if missing else raw
        self.page_bytes = page_bytes
        self._words: npt.NDArray[np.uint16] = self.bytes.view("<u2")
        self._used = np.zeros(len(self.bytes) // page_bytes, dtype=np.bool_)

    def check(self, metas: list[Meta], names: Set[str]) -> None:
        """CorruptError, which says what is wrong, unless LMDB can work on the file.

        ``names`` are those of the databases that it may have.
        """
        for number, meta in enumerate(metas):
            if meta.transaction > TRANSACTION_MAX or (
                meta.transaction and meta.transaction % META_PAGES != number
            ):
                raise CorruptError(f"meta page {number} names transaction {meta.transaction}")
        if abs(metas[0].transaction - metas[1].transaction) > 1:
            raise CorruptError("the meta pages are not of successive transactions")
        meta = max(metas, key=lambda meta: meta.transaction)
        if meta.last_page >= len(self._used) or meta.last_page + 1 < META_PAGES:
            raise CorruptError(f"the last page is {meta.last_page} of {len(self._used)}")
        self._used = self._used[: meta.last_page + 1]
        self._used[:META_PAGES] = True
        subs = self._check_tree("main", meta.main, flags=0)
        for name, tree in subs:
            if name not in names:
                raise CorruptError(f"it has a database {name!r}")
            self._check_tree(name, tree, flags=0, may_have_trees=False)
        self._check_free(meta)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value on whatever page looks like a leaf, also of older transactions."""
        for page in range(META_PAGES, len(self.bytes) // self.page_bytes):
            try:
                nodes = self._nodes(np.array([page]), LEAF)
            except CorruptError:
                continue
            for i in range(len(nodes.at)):
                try:
                    value, _ = self._value(nodes, i)
                except CorruptError:
                    continue
                yield self._key(nodes, i), value

    # Trees

    def _check_tree(
        self, name: str, tree: Tree, *, flags: int, may_have_trees: bool = True
    ) -> list[tuple[str, Tree]]:
        """Checks a tree, and returns the trees whose roots are its values."""
        if tree.flags != flags or tree.depth > DEPTH_MAX:
            raise CorruptError(f"tree {name} has flags {tree.flags} and depth {tree.depth}")
        empty = tree.root == NO_ROOT
        if empty != (tree.depth == 0) or empty != (tree.entries == 0):
            raise CorruptError(f"tree {name} has {tree.entries} entries and depth {tree.depth}")
        if empty:
            return []
        levels = [np.array([min(tree.root, TRANSACTION_MAX)], dtype=np.int64)]
        nodes_of = []
        for depth in range(tree.depth):
            self._take(levels[-1], name)
            leaf = depth == tree.depth - 1
            nodes_of.append(nodes := self._nodes(levels[-1], LEAF if leaf else BRANCH))
            if not leaf:
                # A branch has the number of its child where a leaf has the size of its data.
                levels.append(nodes.data_bytes | nodes.flags << 32)
        leaves = nodes_of[-1]
        found = (sum(map(len, levels[:-1])), len(levels[-1]), len(leaves.at))
        if found != (tree.branches, tree.leaves, tree.entries):
            raise CorruptError(f"tree {name} has {found} branches, leaves and entries, not {tree}")
        self._check_order(name, nodes_of, integers=bool(flags & INTEGER_KEYS))
        subs: list[tuple[str, Tree]] = []
        overflows = 0
        for i in np.flatnonzero(leaves.flags).tolist():
            value, pages = self._value(leaves, i)
            self._take(pages, name)
            overflows += len(pages)
            if leaves.flags[i] == SUB_TREE:
                if not may_have_trees or len(value) != _TREE.size:
                    raise CorruptError(f"tree {name} has a tree where it may not")
                label = self._key(leaves, i).decode(errors="replace")
                subs.append((label, Tree(*_TREE.unpack(value))))
        if overflows != tree.overflows:
            raise CorruptError(f"tree {name} has {overflows} overflow pages, not {tree.overflows}")
        return subs

    def _take(self, pages: Numbers, name: str) -> None:
        """Marks pages as used; each may be only once."""
        if len(pages) and (pages.min() < META_PAGES or pages.max() >= len(self._used)):
            raise CorruptError(f"{name} names a page outside of the file")
        if self._used[pages].any() or len(np.unique(pages)) != len(pages):
            raise CorruptError(f"{name} names a page that is in use already")
        self._used[pages] = True

    def _nodes(self, pages: Numbers, flags: int) -> _Nodes:
        """The nodes of branch or leaf pages, which must fill each page's upper part exactly."""
        size = self.page_bytes
        heads = np.ascontiguousarray(self.bytes.reshape(-1, size)[pages, :HEAD_BYTES])
        words = heads.view("<u2").astype(np.int64)
        lower, upper = words[:, 6], words[:, 7]
        sound = heads.view("<u8")[:, 0].astype(np.int64) == pages
        sound &= (words[:, 5] == flags) & (lower > HEAD_BYTES) & (lower % 2 == 0)
        sound &= (lower <= upper) & (upper <= size)
        if not sound.all():
            raise CorruptError(f"page {pages[int(np.argmin(sound))]} is not what it should be")
        counts = (lower - HEAD_BYTES) // 2
        page = np.repeat(np.arange(len(pages)), counts)
        within = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
        place = self._words[(pages[page] * size + HEAD_BYTES) // 2 + within].astype(np.int64)
        sound = (place % 2 == 0) & (place >= upper[page]) & (place <= size - NODE_BYTES)
        if not sound.all():
            bad = pages[page[int(np.argmin(sound))]]
            raise CorruptError(f"page {bad} has a node outside of it")
        at = pages[page] * size + place
        low, high, flag, key_bytes = (self._words[at // 2 + i].astype(np.int64) for i in range(4))
        nodes = _Nodes(page, at, key_bytes, low | high << 16, flag)
        self._check_packed(pages, nodes, upper, leaf=flags == LEAF)
        return nodes

    def _check_packed(self, pages: Numbers, nodes: _Nodes, upper: Numbers, *, leaf: bool) -> None:
        stored = NODE_BYTES + nodes.key_bytes
        if leaf:
            stored += np.where(nodes.flags & BIG, 8, nodes.data_bytes)
        stored += stored % 2
        order = np.argsort(nodes.at)
        start, end, page = nodes.at[order], (nodes.at + stored)[order], nodes.page[order]
        last = np.append(page[1:] != page[:-1], True)
        follows = np.append(start[1:], 0)
        goal = np.where(last, (pages[page] + 1) * self.page_bytes, follows)
        first = np.append(True, last[:-1])
        sound = (end == goal) & (~first | (start == pages[page] * self.page_bytes + upper[page]))
        sound &= nodes.key_bytes[order] <= KEY_BYTES_MAX
        if leaf:
            sound &= nodes.flags[order] <= SUB_TREE
        if not sound.all():
            bad = pages[page[int(np.argmin(sound))]]
            raise CorruptError(f"page {bad} has nodes that do not fit together")

    # Keys and values

    def _key(self, nodes: _Nodes, i: int) -> bytes:
        start = int(nodes.at[i]) + NODE_BYTES
        return self.bytes[start : start + int(nodes.key_bytes[i])].tobytes()

    def _value(self, nodes: _Nodes, i: int) -> tuple[bytes, Numbers]:
        """A leaf's value, and the overflow pages that it takes."""
        start = int(nodes.at[i] + NODE_BYTES + nodes.key_bytes[i])
        nbytes = int(nodes.data_bytes[i])
        if not nodes.flags[i] & BIG:
            return self.bytes[start : start + nbytes].tobytes(), np.zeros(0, np.int64)
        first = int.from_bytes(self.bytes[start : start + 8].tobytes(), "little")
        count = (HEAD_BYTES - 1 + nbytes) // self.page_bytes + 1
        if first < META_PAGES or first + count > len(self._used):
            raise CorruptError(f"page {first} is outside of the file")
        if (first + count) * self.page_bytes > self._file_bytes:
            raise CorruptError(f"the file ends before the {count} pages from page {first} on do")
        start = first * self.page_bytes
        number, _, flags, pages = struct.unpack("<QHHI", self.bytes[start : start + 16].tobytes())
        if (number, flags, pages) != (first, OVERFLOW, count):
            raise CorruptError(f"page {first} is not the overflow page that it should be")
        start += HEAD_BYTES
        value = self.bytes[start : start + nbytes].tobytes()
        return value, np.arange(first, first + count, dtype=np.int64)

    def _keys(self, nodes: _Nodes) -> list[bytes]:
        sizes = np.unique(nodes.key_bytes)
        if len(sizes) == 1 and sizes[0]:
            width = int(sizes[0])
            # Keys begin at even bytes: one element of this view each, not one a byte.
            count = (len(self.bytes) - width) // 2 + 1
            view = np.ndarray(count, dtype=f"V{width}", buffer=self.bytes, strides=(2,))
            keys: list[bytes] = view[(nodes.at + NODE_BYTES) // 2].tolist()
            return keys
        return [self._key(nodes, i) for i in range(len(nodes.at))]

    def _check_order(self, name: str, levels: list[_Nodes], *, integers: bool) -> None:
        """Keys ascend, and every key is where a search for it would look."""
        keys = self._keys(levels[-1])
        if integers:
            if any(len(key) != 8 for key in keys):
                raise CorruptError(f"tree {name} has a key that is no number")
            keys = [key[::-1] for key in keys]
        if not all(map(bytes.__lt__, keys, keys[1:])):
            raise CorruptError(f"tree {name} has keys out of order")
        last_of_page = np.flatnonzero(np.append(np.diff(levels[-1].page) != 0, True))
        first_of_page = np.append(0, last_of_page[:-1] + 1)
        firsts = [keys[i] for i in first_of_page.tolist()]
        lasts = [keys[i] for i in last_of_page.tolist()]
        for nodes in reversed(levels[:-1]):
            bounds = self._keys(nodes)
            if integers:
                bounds = [bound[::-1] for bound in bounds]
            inner = np.append(False, np.diff(nodes.page) == 0)
            for i in np.flatnonzero(inner).tolist():
                if not lasts[i - 1] < bounds[i] <= firsts[i]:
                    raise CorruptError(f"tree {name} has a key where no search finds it")
            firsts = [firsts[i] for i in np.flatnonzero(~inner).tolist()]
            ends = np.flatnonzero(np.append(~inner[1:], True))
            lasts = [lasts[i] for i in ends.tolist()]

    def _check_free(self, meta: Meta) -> None:
        """The tree of free pages, by the transaction that freed them; none may be in use."""
        name = "of free pages"
        # What follows the flag are options of the map, such as a fixed address.
        self._check_tree(name, meta.free, flags=INTEGER_KEYS)
        pages = np.array([min(meta.free.root, TRANSACTION_MAX)], dtype=np.int64)
        for depth in range(meta.free.depth):
            leaf = depth == meta.free.depth - 1
            nodes = self._nodes(pages, LEAF if leaf else BRANCH)
            if not leaf:
                pages = nodes.data_bytes | nodes.flags << 32
                continue
            for i in range(len(nodes.at)):
                transaction = int.from_bytes(self._key(nodes, i), "little")
                value, _ = self._value(nodes, i)
                self._check_free_list(transaction, value, meta)

    def _check_free_list(self, transaction: int, value: bytes, meta: Meta) -> None:
        numbers = np.frombuffer(value[: len(value) // 8 * 8], dtype="<u8")
        if not 0 < transaction <= meta.transaction or not len(numbers):
            raise CorruptError(f"free pages of transaction {transaction} are not to be believed")
        count = int(numbers[0])
        free = numbers[1 : 1 + count]
        if len(free) != count or (len(free) and free.max() >= len(self._used)):
            raise CorruptError(f"free pages of transaction {transaction} are outside of the file")
        signed: Numbers = free.astype(np.int64)
        if (np.diff(signed) >= 0).any():
            raise CorruptError(f"free pages of transaction {transaction} are out of order")
        self._take(signed, "the list of free pages")
