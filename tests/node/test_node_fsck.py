"""kvstore fsck's check on directories that a node wrote and something damaged."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from kvstore.core.fsck import Fault, count_faults
from kvstore.core.ssd_record import SsdRecord
from kvstore.errors import ConfigError, CorruptError
from kvstore.faultpoint import enable_faultpoints
from kvstore.node import fsck as check
from kvstore.node import ssd_index
from kvstore.node.block_reader import BlockReader
from kvstore.node.dir_lock import DirectoryLock
from kvstore.node.ssd_index import SsdIndex

from tests.node.rig import BLOCK_BYTES, SYNCED, LocalNode, RawSession, keys_of

BLOCKS = 12
MakeNode = Callable[..., LocalNode]


@pytest.fixture
async def keys(make_node: MakeNode) -> list[bytes]:
    """A chain that a node, now stopped, left on SSD."""
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    keys = keys_of(BLOCKS)
    assert await session.put(keys, level=SYNCED) == bytes([SYNCED] * BLOCKS)
    await session.goodbye()
    await node.stop()
    return keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ssd"


def run(folder: Path, *, repair: bool = False) -> check.Report:
    return check.fsck(folder, repair=repair, progress=lambda _done, _total: None)


def edit(folder: Path, database: bytes, change: Callable[[Any], None]) -> None:
    env = lmdb.open(str(folder / "index"), max_dbs=3)
    with env.begin(write=True, db=env.open_db(database)) as txn:
        change(txn)
    env.close()


def record_of(folder: Path, key: bytes) -> SsdRecord:
    found: list[bytes] = []
    edit(folder, b"blocks", lambda txn: found.append(txn.get(key)))
    return SsdRecord.decode(key, found[0])


def flip(folder: Path, key: bytes) -> None:
    """Changes one bit of a block on the medium."""
    with open(folder / "data", "r+b") as file:
        file.seek(record_of(folder, key).ssd_offset + 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


async def test_a_healthy_directory_is_clean_and_untouched(keys: list[bytes], folder: Path) -> None:
    before = (folder / "index" / "data.mdb").read_bytes()
    seen: list[tuple[int, int]] = []
    report = check.fsck(folder, repair=False, progress=lambda *step: seen.append(step))
    assert report.clean
    assert (report.records, report.read_bytes) == (len(keys), BLOCKS * BLOCK_BYTES)
    assert seen[-1] == (BLOCKS * BLOCK_BYTES, BLOCKS * BLOCK_BYTES)
    assert (folder / "index" / "data.mdb").read_bytes() == before
    assert run(folder, repair=True).clean


async def test_I1_corrupt_blocks_and_those_behind_them_are_dropped(
    keys: list[bytes], folder: Path, make_node: MakeNode
) -> None:
    flip(folder, keys[4])
    report = run(folder)
    assert count_faults(report.findings) == {Fault.CORRUPT: 1, Fault.ORPHAN: BLOCKS - 5}
    assert run(folder).findings == report.findings, "a check changes nothing"
    assert run(folder, repair=True).repaired
    assert run(folder).clean
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    assert (await session.check(keys)).granted == 4
    assert await session.put(keys, level=SYNCED) == bytes([SYNCED] * (BLOCKS - 4))
    await session.goodbye()
    await node.stop()
    assert run(folder).records == BLOCKS


async def test_damaged_records(keys: list[bytes], folder: Path) -> None:
    good = record_of(folder, keys[0])

    def damage(txn: Any) -> None:
        txn.put(keys[-1], b"too short")
        txn.put(keys[-2], record_of_last._replace(ssd_offset=1 << 50).encode())
        txn.put(b"k" * 32, good._replace(key=b"k" * 32, sequence=0).encode())
        txn.put(b"f" * 32, good._replace(key=b"f" * 32, nbytes=4096).encode())

    record_of_last = record_of(folder, keys[-2])
    edit(folder, b"blocks", damage)
    expected = {Fault.MALFORMED: 1, Fault.OUTSIDE: 1, Fault.OVERLAP: 1, Fault.FOREIGN: 1}
    assert count_faults(run(folder, repair=True).findings) == expected
    report = run(folder)
    assert (report.clean, report.records) == (True, BLOCKS - 2)


async def test_a_namespace_of_another_block_format(keys: list[bytes], folder: Path) -> None:
    def break_all(txn: Any) -> None:
        for root, _ in list(txn.cursor()):
            txn.put(root, b"\xff\xff")

    edit(folder, b"namespaces", break_all)
    assert count_faults(run(folder).findings) == {Fault.FOREIGN: len(keys)}


async def test_a_data_file_that_was_cut_off(keys: list[bytes], folder: Path) -> None:
    length = record_of(folder, keys[8]).ssd_offset
    os.truncate(folder / "data", length)
    report = run(folder)
    assert report.wrong_size
    assert (report.data_bytes, report.data_bytes_noted) == (length, 16 << 20)
    lost = {f.key for f in report.findings if f.fault is Fault.OUTSIDE}
    assert keys[8] in lost
    run(folder, repair=True)
    assert run(folder).clean


async def test_a_data_file_that_is_gone(keys: list[bytes], folder: Path) -> None:
    (folder / "data").unlink()
    report = run(folder, repair=True)
    assert report.wrong_size
    assert report.data_bytes is None
    assert count_faults(report.findings) == {Fault.OUTSIDE: len(keys)}
    report = run(folder)
    assert (report.clean, report.records, report.data_bytes_noted) == (True, 0, None)


async def test_a_block_that_the_device_refuses(
    keys: list[bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = record_of(folder, keys[-1]).ssd_offset
    real = os.preadv

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset <= bad < offset + sum(len(b) for b in buffers):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    report = run(folder)
    assert [(f.fault, f.key) for f in report.findings] == [(Fault.UNREADABLE, keys[-1])]
    assert report.read_bytes == (BLOCKS - 1) * BLOCK_BYTES


async def test_a_running_node_is_not_disturbed(node: LocalNode) -> None:
    with pytest.raises(ConfigError, match="in use by a running node; stop the node"):
        run(node.config.ssd_path)


def test_what_is_no_ssd_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ssd-dir"):
        run(tmp_path / "nothing")
    (tmp_path / "index").mkdir()
    with pytest.raises(ConfigError, match="--ssd-dir"):
        run(tmp_path)
    (tmp_path / "index" / "data.mdb").write_bytes(b"\1" * 8192)
    with pytest.raises(CorruptError, match="SSD index"):
        run(tmp_path)
    DirectoryLock(tmp_path).release()  # is free again


async def test_an_index_that_is_cut_off(
    keys: list[bytes], folder: Path, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "index" / "data.mdb"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptError, match=r"fsck .*/data/ssd --repair"):
        run(folder)
    monkeypatch.setattr(ssd_index, "GROWTH_BYTES_MIN", 0)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CorruptError, match=r"bytes; .*--repair"):
        run(folder)
    with pytest.raises(CorruptError, match="--repair"):
        await make_node().start()


def lose_the_root(path: Path) -> None:
    """Damages what both transactions of the index begin with, and nothing that it holds."""
    with open(path, "r+b") as file:
        for page in (0, 4096):
            file.seek(page + 16)
            file.write(b"gone")


@pytest.mark.parametrize("damage", [lose_the_root, Path.unlink, lambda path: os.truncate(path, 0)])
async def test_I8_a_damaged_index_is_rebuilt_of_what_it_held(
    keys: list[bytes], folder: Path, make_node: MakeNode, damage: Callable[[Path], None]
) -> None:
    flip(folder, keys[-1])
    damage(folder / "index" / "data.mdb")
    with pytest.raises(CorruptError, match="--repair"):
        await make_node().start()
    for repair in (False, False):
        with pytest.raises(CorruptError, match="--repair"):
            run(folder, repair=repair)
    report = run(folder, repair=True)
    assert "--repair" in report.index_damage
    kept = BLOCKS - 1 if damage is lose_the_root else 0
    assert report.records == (BLOCKS if kept else 0)
    assert count_faults(report.findings) == ({Fault.CORRUPT: 1} if kept else {})
    assert run(folder).clean
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    assert (await session.check(keys)).granted == kept
    await session.put(keys, level=SYNCED)
    await session.goodbye()
    await node.stop()


async def test_I8_a_rebuild_that_is_killed_is_repeated(
    keys: list[bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    lose_the_root(folder / "index" / "data.mdb")
    for step in ("link", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, killed)
            with pytest.raises(KeyboardInterrupt):
                run(folder, repair=True)
    assert run(folder, repair=True).records == BLOCKS
    assert run(folder).clean


def everything_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("whole", [False, True], ids=["index file", "index directory"])
async def test_a_rebuilt_index_belongs_to_the_user_of_the_old_one(
    keys: list[bytes], folder: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    lose_the_root(folder / "index" / "data.mdb")
    if whole:
        shutil.rmtree(folder / "index")
    for path in (folder, *everything_in(folder)):
        os.chown(path, 12345, 12346)
    before = everything_in(folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, "chown", refuse)
        with pytest.raises(ConfigError, match=r"user id 12345, .*: repair it as that user"):
            run(folder, repair=True)
    assert everything_in(folder) == before
    run(folder, repair=True)
    assert (folder / "index" / "lock.mdb").exists()
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in everything_in(folder)}
    assert owners == {(12345, 12346)}


async def test_an_index_that_cannot_be_opened(keys: list[bytes], folder: Path) -> None:
    path = folder / "index" / "data.mdb"
    path.rename(path.with_name("other"))
    path.mkdir()
    with pytest.raises(ConfigError, match="SSD index"):
        run(folder)


@pytest.mark.parametrize(("version", "age"), [(b"1", "older"), (b"3", "newer"), (None, "older")])
async def test_another_format_version_is_left_alone(
    keys: list[bytes], folder: Path, version: bytes | None, age: str
) -> None:
    def change(txn: Any) -> None:
        if version is None:
            txn.delete(b"format_version")
        else:
            txn.put(b"format_version", version)

    edit(folder, b"meta", change)
    shown = version.decode() if version else "unknown"
    for repair in (False, True):
        with pytest.raises(ConfigError, match=f"format version {shown}, .* version 2: .* {age}"):
            run(folder, repair=repair)


async def test_I8_repair_killed_halfway_is_repeated(
    keys: list[bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(folder, keys[2])
    monkeypatch.setattr(check, "DROPS_PER_COMMIT", 3)
    real = SsdIndex.apply
    calls: list[int] = []

    def apply(self: SsdIndex, changes: Any, sequence: int = 0) -> None:
        calls.append(1)
        if len(calls) == 3:  # the first notes the mark
            raise KeyboardInterrupt
        real(self, changes, sequence)

    monkeypatch.setattr(SsdIndex, "apply", apply)
    with pytest.raises(KeyboardInterrupt):
        run(folder, repair=True)
    assert len(run(folder).findings) == BLOCKS - 2 - 3
    run(folder, repair=True)
    assert run(folder).clean


async def test_reader_without_direct_io(
    keys: list[bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    assert run(folder).clean


async def test_unreadable_file(keys: list[bytes], folder: Path, monkeypatch: Any) -> None:
    def refuse(_self: BlockReader, path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(BlockReader, "__init__", refuse)
    with pytest.raises(ConfigError, match="data: Permission denied"):
        run(folder)


async def test_a_read_that_fails_once_is_tried_block_by_block(
    keys: list[bytes], folder: Path
) -> None:
    enable_faultpoints({"KVSTORE_FAULTPOINTS": "ssd.check:eio@1"})
    try:
        assert run(folder).clean
    finally:
        enable_faultpoints({})
