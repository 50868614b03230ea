"""The check of an LMDB file's pages: it takes everything that LMDB writes, and nothing damaged."""

import random
from pathlib import Path

import lmdb
import pytest
from kvstore.errors import CorruptError
from kvstore.node.index_pages import PAGE_BYTES_MAX, IndexPages, Meta, read_metas

DATABASES = (b"meta", b"blocks", b"namespaces")


def pages_of(path: Path) -> tuple[IndexPages, list[Meta]]:
    """A file's pages; those at its end that LMDB never wrote are zeros."""
    with open(path / "data.mdb", "r+b") as file:
        metas = read_metas(file.read(2 * PAGE_BYTES_MAX))
        needed = (max(meta.last_page for meta in metas) + 1) * metas[0].page_bytes
        if file.seek(0, 2) < needed:
            file.truncate(needed)
    return IndexPages(path / "data.mdb", metas[0].page_bytes), metas


def check(path: Path) -> None:
    pages, metas = pages_of(path)
    pages.check(metas, {name.decode() for name in DATABASES})


def live_through(path: Path, rng: random.Random) -> dict[bytes, bytes]:
    """A life of an index: groups of puts and removals, values of many sizes."""
    env = lmdb.open(str(path), map_size=1 << 28, max_dbs=3, sync=False)
    databases = [env.open_db(name) for name in DATABASES]
    held: dict[bytes, bytes] = {}
    for _ in range(rng.choice([1, 5, 60])):
        removing = rng.random()
        with env.begin(write=True, db=databases[1]) as txn:
            for _ in range(rng.choice([1, 30, 300])):
                if held and rng.random() < removing:
                    key = rng.choice(list(held)[:8])
                    txn.delete(key)
                    del held[key]
                else:
                    key = rng.randbytes(32)
                    held[key] = rng.randbytes(rng.choice([112, 112, 1000, 2160]))
                    txn.put(key, held[key])
        if rng.random() < 0.3:
            with env.begin(write=True, db=databases[2]) as txn:
                txn.put(rng.randbytes(32), rng.randbytes(rng.randrange(100, 5000)))
            with env.begin(write=True, db=databases[0]) as txn:
                txn.put(b"data_bytes", b"%d" % rng.randrange(10**9))
        if rng.random() < 0.1:
            check(path)
    env.close()
    return held


@pytest.mark.parametrize("seed", range(12))
def test_I8_whatever_lmdb_writes_is_taken_and_can_be_read(tmp_path: Path, seed: int) -> None:
    held = live_through(tmp_path, random.Random(seed))
    check(tmp_path)
    pages, _ = pages_of(tmp_path)
    assert held.items() <= set(pages.entries())


def test_an_index_in_which_nothing_is_yet(tmp_path: Path) -> None:
    env = lmdb.open(str(tmp_path), max_dbs=3)
    check(tmp_path)
    env.open_db(b"blocks")
    check(tmp_path)
    env.close()


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (16, b"\0", "page 0 is no meta page"),
        (4096 + 10, b"\0", "page 1 is no meta page"),
        (40, b"\1\0\0\0", "claims pages of 1 bytes"),
        (4096 + 40, b"\0\x20", "of different sizes"),
        (144, b"\xff" * 8, "names transaction 18446744073709551615"),
        (144, b"\1", "meta page 0 names transaction"),
        (4096 + 144, b"\xff", "not of successive transactions"),
    ],
)
def test_I11_a_damaged_meta_page_is_named(tmp_path: Path, at: int, value: bytes, said: str) -> None:
    live_through(tmp_path, random.Random(1))
    with open(tmp_path / "data.mdb", "r+b") as file:
        file.seek(at)
        file.write(value)
    with pytest.raises(CorruptError, match=said):
        check(tmp_path)


def test_I8_a_database_under_a_wrong_name_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    live_through(tmp_path, random.Random(1))
    path = tmp_path / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"blocks", b"clocks"))
    with pytest.raises(CorruptError, match="a database 'clocks'"):
        check(tmp_path)


def test_I11_no_flipped_byte_of_a_page_is_followed_astray(tmp_path: Path) -> None:
    """A flip is found, or lies in a key, a value or unused bytes: LMDB reads every entry then."""
    rng = random.Random(3)
    held = live_through(tmp_path, random.Random(2))
    path = tmp_path / "data.mdb"
    good = path.read_bytes()
    found = 0
    for _ in range(400):
        at = rng.randrange(len(good) // 4096) * 4096 + rng.choice(
            [rng.randrange(64), rng.randrange(4096)]
        )
        path.write_bytes(good[:at] + bytes([good[at] ^ rng.randrange(1, 256)]) + good[at + 1 :])
        try:
            check(tmp_path)
        except CorruptError:
            found += 1
            continue
        env = lmdb.open(str(tmp_path), map_size=1 << 28, max_dbs=3)
        with env.begin(write=True, db=env.open_db(b"blocks")) as txn:
            read = dict(txn.cursor())
            for key in read:
                txn.delete(key)
        env.close()
        assert read.keys() & held.keys()
    assert found
