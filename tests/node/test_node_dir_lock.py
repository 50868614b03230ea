"""No two nodes share an SSD directory, whatever paths lead to it."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvstore.errors import ConfigError
from kvstore.node.dir_lock import DirectoryInUseError, DirectoryLock

from tests.node.rig import SYNCED, LocalNode, RawSession, keys_of

MakeNode = Callable[..., LocalNode]


def to_itself(path: Path, folder: Path) -> Path:
    return path


def to_link(path: Path, folder: Path) -> Path:
    (folder / "link").symlink_to(path, target_is_directory=True)
    return folder / "link"


def to_link_of_parent(path: Path, folder: Path) -> Path:
    (folder / "up").symlink_to(path.parent, target_is_directory=True)
    return folder / "up" / path.name


def to_detour(path: Path, folder: Path) -> Path:
    return path / ".." / "." / path.name


WAYS = [to_itself, to_link, to_link_of_parent, to_detour]


def other(tmp_path: Path) -> dict[str, object]:
    """Settings of a second node with directories of its own."""
    return {"data_dir": tmp_path / "other", "node_id": "other"}


@pytest.mark.parametrize("way", WAYS)
async def test_one_ssd_directory_one_node(
    node: LocalNode, make_node: MakeNode, tmp_path: Path, way: Callable[[Path, Path], Path]
) -> None:
    session = await RawSession.open(node.address)
    keys = keys_of(4)
    await session.put(keys, level=SYNCED)
    path = way(node.config.ssd_path, tmp_path)
    with pytest.raises(ConfigError, match="in use by another node"):
        await make_node(**other(tmp_path), ssd_dir=str(path)).start()
    assert (await session.check(keys)).granted == 4
    assert await session.put(keys_of(4, 2), level=SYNCED) == bytes([SYNCED] * 4)
    await session.goodbye()


@pytest.mark.parametrize("way", WAYS)
async def test_one_data_directory_one_node(
    node: LocalNode, make_node: MakeNode, tmp_path: Path, way: Callable[[Path, Path], Path]
) -> None:
    path = way(node.config.data_dir, tmp_path)
    with pytest.raises(ConfigError, match="in use by another node"):
        await make_node(data_dir=path, node_id="other").start()
    with pytest.raises(ConfigError, match="in use by another node"):
        await make_node(**other(tmp_path), ssd_dir=str(path)).start()


@pytest.mark.parametrize("way", WAYS)
async def test_a_node_may_keep_its_ssd_tier_in_its_data_directory(
    make_node: MakeNode, tmp_path: Path, way: Callable[[Path, Path], Path]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    node = make_node(ssd_dir=str(way(data, tmp_path)))
    await node.start()
    with pytest.raises(ConfigError, match="in use by another node"):
        await make_node(**other(tmp_path), ssd_dir=str(data)).start()


async def test_a_linked_data_file_is_refused(
    node: LocalNode, make_node: MakeNode, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    its_own = make_node(**other(tmp_path), ssd_dir=str(second))
    await its_own.start()
    await its_own.stop()
    (second / "data").unlink()
    (second / "data").symlink_to(node.config.ssd_path / "data")
    with pytest.raises(ConfigError, match=r"data .*in use by another node"):
        await make_node(**other(tmp_path), ssd_dir=str(second)).start()


async def test_a_copied_directory_belongs_to_its_node(make_node: MakeNode, tmp_path: Path) -> None:
    node = make_node()
    await node.start()
    await node.stop()
    shutil.copytree(node.config.ssd_path, tmp_path / "copy")
    with pytest.raises(ConfigError, match="belongs to node_id"):
        await make_node(**other(tmp_path), ssd_dir=str(tmp_path / "copy")).start()


async def test_the_directory_is_free_when_its_node_has_ended(
    make_node: MakeNode, tmp_path: Path
) -> None:
    node = make_node(node_id="same")
    await node.start()
    await node.stop()
    again = make_node(node_id="same", data_dir=tmp_path / "b", ssd_dir=str(node.config.ssd_path))
    await again.start()


def test_a_lock_is_one_whatever_link_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    lock = DirectoryLock(tmp_path / "real")
    for way in WAYS:
        with pytest.raises(DirectoryInUseError):
            DirectoryLock(way(tmp_path / "real", tmp_path), patience_s=0.0)
    lock.release()
    DirectoryLock(tmp_path / "link").release()


only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")


@pytest.mark.parametrize("exists", [True, False])
def test_a_lock_that_is_a_link_is_refused(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "target"
    if exists:
        target.touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lock").symlink_to(target)
    with pytest.raises(ConfigError, match=r"a/lock is a symbolic link; remove it"):
        DirectoryLock(tmp_path / "a", patience_s=0.0)
    assert target.exists() == exists


@only_root
def test_root_gives_away_no_file_but_the_lock_that_it_made(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    for name, plant in (("link", os.symlink), ("name", os.link), ("none", None)):
        folder = tmp_path / name
        folder.mkdir()
        os.chown(folder, 12345, 12346)
        if plant is not None:
            plant(secret, folder / "lock")
        try:
            DirectoryLock(folder, patience_s=0.0).release()
        except ConfigError:
            assert name == "link"
        assert (secret.stat().st_uid, secret.stat().st_gid) == (0, 0)
    made = (tmp_path / "none" / "lock").stat()
    assert (made.st_uid, made.st_gid) == (12345, 12346)


@only_root
def test_a_lock_that_cannot_be_given_away_is_held_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:  # as in a user namespace that has no such user
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fchown", refuse)
    DirectoryLock(tmp_path).release()


@only_root
def test_an_owner_may_remove_the_directory_while_its_lock_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    opened: list[int] = []
    real = os.open

    def open_and_remove(*arguments: Any, **options: Any) -> int:
        descriptor = real(*arguments, **options)
        if not opened:
            (folder / "lock").unlink()
            folder.rmdir()
        opened.append(descriptor)
        return descriptor

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_and_remove)
        lock = DirectoryLock(folder)
    lock.release()
    assert len(opened) > 1
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
