"""kvstore fsck's repair of an index: of what its pages still hold, the bytes say what is true."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvstore.core.fsck import Fault, count_faults
from kvstore.core.ssd_mark import Mark
from kvstore.core.ssd_record import NO_PARENT, SHARDS_MAX, SsdRecord
from kvstore.core.types import Tier
from kvstore.errors import ConfigError
from kvstore.faultpoint import enable_faultpoints
from kvstore.node import fsck as check
from kvstore.node import ssd_index
from kvstore.node.index_rebuild import IndexRebuild

from tests.node.rig import SYNCED, LocalNode, RawSession, keys_of
from tests.node.ssd_directory import (
    PAGE,
    ROOT,
    SLOTS,
    Directory,
    key_of,
    lose_the_root,
    mark_in,
    run,
)

OLD, NEW = 200, 50
MakeNode = Callable[..., LocalNode]


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "ssd")


def test_I8_a_stale_record_with_a_higher_sequence_loses_to_the_bytes(directory: Directory) -> None:
    old = [directory.write(number, number, 1000 + number) for number in range(OLD)]
    directory.remove(range(1, OLD))
    new = [directory.write_block(1000 + slot, slot, slot) for slot in range(1, 1 + NEW)]
    directory.index.apply([(record.key, record.encode()) for record in new], NEW)
    directory.lose_the_root()
    pages = (directory.path / "index" / "data.mdb").read_bytes()
    assert sum(record.encode() in pages for record in old[1 : NEW + 1]) >= NEW // 2
    report = run(directory.path, repair=True)
    assert report.index_damage
    kept = directory.kept()
    assert kept.keys() >= {0, *range(1001, 1001 + NEW)}
    assert not kept.keys() & set(range(1, NEW + 1))
    assert count_faults(report.findings).keys() <= {Fault.OVERLAP}
    assert run(directory.path).clean


def test_I8_of_two_records_of_one_key_the_one_with_its_bytes_stays(directory: Directory) -> None:
    directory.write(0, 100, 1)
    stale = directory.write(1, 5, 1000)
    for number in range(2, 40):
        directory.write(number, 40 + number, 1000 + number)
    directory.remove(range(1, 40))
    live = directory.write(1, 6, 2)
    directory.write(40, 5, 3)
    directory.lose_the_root()
    assert stale.encode() in (directory.path / "index" / "data.mdb").read_bytes()
    run(directory.path, repair=True)
    kept = directory.kept()
    assert (kept[1], kept[40].ssd_offset) == (live, 5 * PAGE)


def test_I8_of_two_records_that_have_their_bytes_the_newer_stays(directory: Directory) -> None:
    same = os.urandom(PAGE)
    directory.write(0, 100, 1)
    directory.write(1, 5, 2, same)
    directory.write(2, 6, 3)
    directory.remove([1])
    directory.write(3, 5, 4, same)
    directory.lose_the_root()
    run(directory.path, repair=True)
    assert directory.kept().keys() == {0, 2, 3}


def test_I8_what_was_removed_before_the_index_was_empty_stays_away(directory: Directory) -> None:
    for number in range(50):
        directory.write(number, number, number + 1)
    directory.remove(range(50))
    directory.write(100, 200, 51)
    directory.lose_the_root()
    report = run(directory.path, repair=True)
    assert directory.kept().keys() == {100}
    assert (report.records, report.findings) == (1, [])


async def purged_and_restarted(
    make_node: MakeNode, old: list[bytes], new: list[bytes], *, stays: int
) -> Path:
    """Stores old blocks, removes all but some, restarts, stores new ones; the node is stopped."""
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    for first in range(0, OLD, 50):
        put = await session.put(old[first : first + 50], level=SYNCED)
        assert put == bytes([SYNCED] * 50)
    await session.goodbye()
    core, now = node.node.core, node.node.now()
    gone = b"".join(old[stays:])
    effects, _ = core.evict(Tier.SSD, gone, 0, True, now) if stays else core.purge(None, now)
    node.node.apply(effects)
    await node.idle()
    await node.stop()
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    assert await session.put(new, level=SYNCED) == bytes([SYNCED] * NEW)
    await session.goodbye()
    await node.stop()
    return node.config.ssd_path


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("stays", [0, 1])
async def test_I8_no_live_block_is_lost_to_a_purged_one(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, marked: bool, stays: int
) -> None:
    old, new = keys_of(OLD, seed=1), keys_of(NEW, seed=2)
    with monkeypatch.context() as patched:
        if not marked:  # an index of a version that knew no marks
            patched.setattr(Mark, "after", lambda *_, **__: Mark())
            patched.setattr(Mark, "of", lambda *_: Mark())
        folder = await purged_and_restarted(make_node, old, new, stays=stays)
    lose_the_root(folder)
    run(folder, repair=True)
    assert run(folder).clean
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    assert (await session.check(new)).granted == NEW
    granted = (await session.check(old)).granted
    assert granted == 0 or not (marked and not stays)
    await session.goodbye()
    await node.stop()


async def test_I8_sequences_go_on_after_a_purge_and_a_restart(make_node: MakeNode) -> None:
    old, new = keys_of(OLD, seed=1), keys_of(NEW, seed=2)
    folder = await purged_and_restarted(make_node, old, new, stays=0)
    assert mark_in(folder) == Mark(OLD + NEW, OLD + 1)


def test_a_check_does_not_lengthen_the_index(directory: Directory) -> None:
    """LMDB does not write pages at the end of its file that are in no tree."""
    for number in range(SLOTS):
        directory.write(number, number, number + 1)
    directory.remove(range(10, SLOTS))
    for number in range(8):
        directory.write(number, number, 1000 + number)
    directory.index.close()
    directory.data.close()
    path = directory.path / "index" / "data.mdb"
    os.truncate(path, path.stat().st_size - PAGE)
    short = path.read_bytes()
    before = set(directory.path.rglob("*"))
    assert run(directory.path).clean
    assert path.read_bytes() == short
    assert set(directory.path.rglob("*")) == before, "neither a lock file"
    assert run(directory.path, repair=True).clean


def everything_in(folder: Path) -> set[Path]:
    return {folder, *folder.rglob("*")}


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("repair", [False, True])
def test_what_root_makes_in_a_copied_directory_is_its_owners(
    directory: Directory, repair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.write(0, 0, 1)
    directory.index.close()
    directory.data.close()
    (directory.path / "index" / "lock.mdb").unlink()
    for path in everything_in(directory.path):
        os.chown(path, 12345, 12346)
    owners: set[Any] = set()
    real = check._check

    def see(*arguments: Any) -> Any:
        made = [path.stat() for path in everything_in(directory.path)]
        owners.update((found.st_uid, found.st_gid) for found in made)
        return real(*arguments)

    monkeypatch.setattr(check, "_check", see)
    before = everything_in(directory.path)
    assert run(directory.path, repair=repair).clean
    assert owners == {(12345, 12346)}
    assert everything_in(directory.path) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("plant", ["in it", "in its place", "as the index"])
def test_a_repair_by_root_gives_away_nothing_that_a_link_names(
    directory: Directory, tmp_path: Path, plant: str
) -> None:
    directory.write(0, 0, 1)
    directory.lose_the_root()
    for path in everything_in(directory.path):
        os.chown(path, 12345, 12346)
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    for name in ("data.mdb", "lock.mdb", "other"):
        (secret / name).touch()
    new = directory.path / "index.new"
    modes: set[tuple[int, int]] = set()

    def while_it_reads(_done: int, _total: int) -> None:
        modes.add((new.stat().st_uid, new.stat().st_mode & 0o777))
        if plant == "in its place":
            new.rename(directory.path / "moved")
            new.mkdir()
            (new / "index").symlink_to(secret)
        elif plant == "as the index":
            (directory.path / "index").rename(directory.path / "moved")
            (directory.path / "index").symlink_to(secret)
        else:  # more than its user can do to a directory of root
            (new / "x").symlink_to(secret / "other")

    check.fsck(directory.path, repair=True, progress=while_it_reads)
    assert modes == {(0, 0o700)}, "nobody else can make a link in it"
    assert {path.stat().st_uid for path in everything_in(secret)} == {0}
    assert {path.stat().st_size for path in secret.iterdir()} == {0}
    assert not new.exists()
    if plant == "as the index":
        (directory.path / "index").unlink()
        (directory.path / "moved").rename(directory.path / "index")
    assert (directory.path / "index" / "data.mdb").stat().st_uid == 12345
    assert directory.kept().keys() == {0}


def test_a_new_index_has_room_for_records_of_many_shards(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_index, "MAP_BYTES_MIN", 256 << 10)
    directory.write(0, 0, 1)
    directory.lose_the_root()
    sums = tuple(range(SHARDS_MAX))
    records = [
        SsdRecord(key_of(number), ROOT, NO_PARENT, PAGE, number * PAGE, sums, number + 1)
        for number in range(1000)
    ]
    with contextlib.closing(IndexRebuild(directory.path)) as rebuild:
        rebuild.replace(records, np.arange(1, 1001))
    assert directory.kept().keys() == set(range(1000))


def test_a_new_index_without_its_namespaces_is_not_put_into_place(directory: Directory) -> None:
    directory.index.add_namespace(ROOT, b"")
    directory.write(0, 0, 1)
    directory.lose_the_root()
    damaged = (directory.path / "index" / "data.mdb").read_bytes()
    enable_faultpoints({"KVSTORE_FAULTPOINTS": "ssd.namespaces:enospc"})
    try:
        with pytest.raises(ConfigError, match="takes no namespaces"):
            run(directory.path, repair=True)
    finally:
        enable_faultpoints({})
    assert (directory.path / "index" / "data.mdb").read_bytes() == damaged
    assert not (directory.path / "index.new").exists()
