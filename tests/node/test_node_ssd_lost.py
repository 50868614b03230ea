"""Files of the SSD tier that are taken away, before a node starts and from under a running one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kvstore.errors import CorruptError
from kvstore.node import auditor
from kvstore.node.fsck import fsck

from tests.node.rig import HAVE, MEMORY, SLOT, SYNCED, LocalNode, RawSession, keys_of, until

MakeNode = Callable[..., LocalNode]
KEYS = keys_of(8)


@pytest.fixture
async def folder(make_node: MakeNode) -> Path:
    """The SSD directory of a node that has ended."""
    node = make_node()
    await node.start()
    session = await RawSession.open(node.address)
    assert await session.put(KEYS, level=SYNCED) == bytes([SYNCED] * 8)
    await session.goodbye()
    await node.stop()
    return node.config.ssd_path


async def statuses(node: LocalNode) -> bytes:
    """What the node says of the keys to somebody who would store them."""
    session = await RawSession.open(node.address)
    _, reserved = await session.reserve(KEYS)
    await session.goodbye()
    return reserved.statuses


@pytest.mark.parametrize("kept", [None, 0, 4096], ids=["missing", "empty", "cut off"])
async def test_I3_a_node_does_not_claim_blocks_of_a_data_file_that_is_gone(
    folder: Path, make_node: MakeNode, kept: int | None
) -> None:
    if kept is None:
        (folder / "data").unlink()
    else:
        os.truncate(folder / "data", kept)
    for _ in range(2):  # a start that was refused changes nothing
        with pytest.raises(CorruptError, match=rf"data.*fsck {folder} --repair"):
            await make_node().start()
    fsck(folder, repair=True, progress=lambda done, total: None)
    node = make_node()
    await node.start()
    assert SLOT in await statuses(node)
    session = await RawSession.open(node.address)
    await session.put(KEYS, level=SYNCED)
    assert (await session.check(KEYS)).granted == 8
    await session.goodbye()


async def test_a_tier_may_be_made_smaller_and_larger(folder: Path, make_node: MakeNode) -> None:
    for mib in (8, 8, 24):
        node = make_node(ssd=mib << 20)
        await node.start()
        assert await statuses(node) == bytes([HAVE] * 8)
        assert (folder / "data").stat().st_size == mib << 20
        await node.stop()


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def move_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


WAYS = [
    ("data", remove),
    ("data", replace),
    ("data", lambda path: os.truncate(path, 4096)),
    ("data", move_directory),
    ("index/data.mdb", remove),
    ("index/data.mdb", replace),
]
IDS = ["no data", "other data", "cut-off data", "moved", "no index", "other index"]


@pytest.mark.parametrize(("name", "change"), WAYS, ids=IDS)
async def test_I3_nothing_is_acknowledged_that_no_restart_would_find(
    node: LocalNode, name: str, change: Callable[[Path], None]
) -> None:
    session = await RawSession.open(node.address)
    assert await session.put(KEYS, level=SYNCED) == bytes([SYNCED] * 8)
    change(node.config.ssd_path / name)
    for seed in (2, 3):
        assert await session.put(keys_of(8, seed), level=SYNCED) == bytes([MEMORY] * 8)
    [problem] = node.node.problems()
    assert "SSD takes no more writes" in problem
    assert name in problem
    assert (await session.check(KEYS)).granted == 8
    await session.goodbye()


@pytest.mark.parametrize("name", ["data", "index/data.mdb"])
async def test_I3_an_idle_node_notices_too(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(auditor, "EVERY_S", 0.01)
    node = make_node()
    await node.start()
    (node.config.ssd_path / name).unlink()
    await until(lambda: bool(node.node.problems()))
    assert f"{name} was removed" in node.node.problems()[0]
