import contextlib
import errno
import mmap
import os
import tempfile
import threading
from pathlib import Path

import pytest
from kvstore.errors import ConfigError
from kvstore.node import pool
from kvstore.node.dir_lock import DirectoryLock
from kvstore.node.pool import SharedFile, remove_dead_siblings, remove_stale_files
from kvstore.shared_memory import HUGE_PAGE_BYTES, SharedMap


def test_shared_file_is_private_whole_and_zero(tmp_path: Path) -> None:
    file = SharedFile(tmp_path / "pool-1", 1 << 20)
    file.wait_taken()
    stat = file.path.stat()
    assert stat.st_mode & 0o777 == 0o600
    assert stat.st_blocks * 512 >= 1 << 20
    assert file.map.memory == bytes(1 << 20)
    file.close()
    assert not file.path.exists()
    file.close()


@pytest.mark.parametrize("size", [mmap.PAGESIZE, HUGE_PAGE_BYTES, (6 << 20) + mmap.PAGESIZE])
def test_memory_is_where_huge_pages_can_be(tmp_path: Path, size: int) -> None:
    with open(tmp_path / "x", "w+b") as file:
        file.truncate(size)
        maps = [SharedMap(file.fileno(), size) for _ in range(4)]
    assert all(
        shared.address % HUGE_PAGE_BYTES == 0 and len(shared.memory) == size for shared in maps
    )
    maps[0].memory[-1] = 7
    assert maps[3].memory[-1] == 7
    kept = maps[3].memory[-1:]
    for shared in maps:
        shared.close()
        shared.close()
    assert kept[0] == 7


def test_memory_is_somewhere_else_if_need_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_map: SharedMap, _descriptor: int, _size: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(SharedMap, "_map_aligned", refuse)
    file = SharedFile(tmp_path / "pool-1", 1 << 20)
    file.wait_taken()
    file.map.memory[-1] = 7
    assert file.path.read_bytes()[-2:] == bytes([0, 7])
    file.close()


def test_what_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(mmap.PAGESIZE))
    with open(tmp_path / "x", "rb") as file, pytest.raises(OSError, match="denied"):
        SharedMap(file.fileno(), mmap.PAGESIZE)


@pytest.mark.parametrize("size", [mmap.PAGESIZE, HUGE_PAGE_BYTES, (6 << 20) + mmap.PAGESIZE])
def test_pages_are_taken_without_a_touch(size: int) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = SharedFile(Path(folder) / "pool-1", size, touch=False)
        file.wait_taken()
        assert file.path.stat().st_blocks * 512 >= size
        assert file.map.memory == bytes(size)
        file.close()


def test_shared_file_falls_back_where_the_kernel_cannot_populate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MADV_POPULATE_WRITE", 12345)
    file = SharedFile(tmp_path / "pool-1", 1 << 20)
    file.wait_taken()
    assert file.path.stat().st_blocks * 512 >= 1 << 20
    file.close()


@pytest.mark.parametrize("huge", [True, False], ids=["huge-pages", "no-huge-pages"])
def test_every_page_is_taken_whatever_their_size(
    huge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not huge:
        monkeypatch.setattr(pool, "MADV_COLLAPSE", 12345)
    size = (6 << 20) + mmap.PAGESIZE
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = SharedFile(Path(folder) / "pool-1", size)
        file.wait_taken()
        assert file.path.stat().st_blocks * 512 >= size
        assert file.map.memory == bytes(size)
        file.map.memory[-1] = 7
        assert file.path.read_bytes()[-1] == 7
        file.close()


def test_no_room_is_found_before_and_while_allocating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--dram"):
        SharedFile(tmp_path / "pool-1", 1 << 60)

    def full(_start: int, _size: int) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pool, "_populate", full)
    file = SharedFile(tmp_path / "pool-1", 1 << 20)
    with pytest.raises(ConfigError, match="No space left"):
        file.wait_taken()
    file.close()
    assert os.listdir(tmp_path) == []


def test_stale_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("pool-1", "directory-1", "pool-2", "lock", "other"):
        (tmp_path / name).touch()
    assert remove_stale_files(tmp_path) == 3
    assert sorted(os.listdir(tmp_path)) == ["lock", "other"]


def test_directory_has_one_owner(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    lock = DirectoryLock(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="in use by another node"):
        DirectoryLock(folder)
    lock.release()
    DirectoryLock(folder).release(remove=True)
    assert not folder.exists()


def test_lock_keeps_a_directory_with_contents(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    (tmp_path / "file").touch()
    lock.release(remove=True)
    assert os.listdir(tmp_path) == ["file"]


def test_lock_in_an_impossible_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="directory"):
        DirectoryLock(tmp_path / "file" / "x")


def test_pools_of_dead_nodes_are_removed_and_of_living_ones_not(tmp_path: Path) -> None:
    mine, dead, living, foreign = (
        tmp_path / name
        for name in (
            f"kvstore-{os.getuid()}-mine",
            f"kvstore-{os.getuid()}-dead",
            f"kvstore-{os.getuid()}-living",
            f"kvstore-{os.getuid() + 1}-foreign",
        )
    )
    for folder in (mine, dead, living, foreign):
        folder.mkdir()
        (folder / "pool-1").touch()
    lock = DirectoryLock(living)
    assert remove_dead_siblings(mine) == 1
    assert not dead.exists()
    assert all((folder / "pool-1").exists() for folder in (mine, living, foreign))
    lock.release()


def test_the_lock_of_a_dead_node_is_free_before_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing takes a second for 6 GiB, and the node may be started again at any moment."""
    dead = tmp_path / f"kvstore-{os.getuid()}-dead"
    dead.mkdir()
    for name in ("pool-1", "directory-1"):
        (dead / name).touch()
    open_then: list[str] = []

    def release(lock: DirectoryLock, *, remove: bool = False) -> None:
        open_then.extend(open_links())
        real(lock, remove=remove)

    real = DirectoryLock.release
    monkeypatch.setattr(DirectoryLock, "release", release)
    assert remove_dead_siblings(tmp_path / f"kvstore-{os.getuid()}-mine") == 2
    names = {f"{dead}/{name} (deleted)" for name in ("pool-1", "directory-1")}
    assert names <= set(open_then)
    assert not any("(deleted)" in link for link in open_links() if str(dead) in link)
    assert not dead.exists()


def open_links() -> list[str]:
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            links.append(os.readlink(link))
    return links


def test_a_file_that_cannot_be_made_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "pool-1").touch()
    with pytest.raises(ConfigError, match="pool-1 cannot be made: File exists"):
        SharedFile(tmp_path / "pool-1", 1 << 20)


def test_pools_in_links_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "pool-1").touch()
    prefix = f"kvstore-{os.getuid()}-"
    (tmp_path / f"{prefix}link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"{prefix}dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / f"{prefix}file").touch()
    assert remove_dead_siblings(tmp_path / f"{prefix}mine") == 0
    assert os.listdir(tmp_path / "elsewhere") == ["pool-1"]
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_pools_of_another_user_under_this_users_prefix_are_left_alone(tmp_path: Path) -> None:
    planted = tmp_path / "kvstore-0-planted"
    planted.mkdir()
    (planted / "pool-1").touch()
    os.chown(planted, 12345, 12346)
    assert remove_dead_siblings(tmp_path / "kvstore-0-mine") == 0
    assert os.listdir(planted) == ["pool-1"]


def test_lock_waits_for_an_owner_that_is_about_to_end(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "a")
    timer = threading.Timer(0.1, lock.release, kwargs={"remove": True})
    timer.start()
    DirectoryLock(tmp_path / "a", patience_s=5.0).release()
    timer.join()


@pytest.mark.parametrize("other", ["removes the directory", "takes the lock"])
def test_another_start_may_be_as_far_with_the_same_dead_node(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = DirectoryLock(tmp_path / "dead")
    unlink = Path.unlink

    def unlink_then_other(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if other == "removes the directory":
            lock.folder.rmdir()
        else:
            path.touch()

    monkeypatch.setattr(Path, "unlink", unlink_then_other)
    lock.release(remove=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(lock._descriptor)


def test_a_dead_node_whose_files_cannot_be_removed_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        dead = tmp_path / f"kvstore-{os.getuid()}-{name}"
        dead.mkdir()
        (dead / "pool-1").touch()
    unlink = Path.unlink

    def refuse_a(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name.endswith("-a") and path.name == "pool-1":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_a)
    assert remove_dead_siblings(tmp_path / f"kvstore-{os.getuid()}-mine") == 1
    assert [path.name[-2:] for path in tmp_path.iterdir()] == ["-a"]
    DirectoryLock(tmp_path / f"kvstore-{os.getuid()}-a").release()
