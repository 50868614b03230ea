"""The directories of master and node belong to whoever runs them, who need not be root."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvstore.durable import private_directory
from kvstore.master.state.lmdb import LmdbState
from kvstore.node.ssd_index import SsdIndex

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory of the user that the test runs as from here on: where it is root, of nobody."""
    path = Path(tempfile.mkdtemp(prefix="kvstore-test-"))
    root = os.geteuid() == 0
    if root:
        os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield path
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(path)


def test_a_user_can_have_a_master(folder: Path) -> None:
    for epoch in (1, 2):
        state = LmdbState(folder)
        assert state.raise_epoch() == epoch
        state.close()
    assert stat.S_IMODE((folder / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "state" / "data.mdb").stat().st_mode) == 0o600


def test_a_user_can_have_a_node_with_an_ssd(folder: Path) -> None:
    for _ in range(2):
        index = SsdIndex(folder, 1 << 24, "node")
        index.close()
    assert stat.S_IMODE((folder / "index").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "index" / "data.mdb").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize("opens", ["LmdbState(path)", "SsdIndex(path, 1 << 24, 'node')"])
@pytest.mark.parametrize("room_kib", range(4, 60, 8))
def test_a_full_disk_is_a_message(tmp_path: Path, opens: str, room_kib: int) -> None:
    """It was a SIGBUS: LMDB maps a file of locks that is sparse."""
    code = f"""
from pathlib import Path
from kvstore.errors import ConfigError
from kvstore.master.state.lmdb import LmdbState
from kvstore.node.ssd_index import SsdIndex
path = Path({str(tmp_path)!r})
try:
    {opens}.close()
except ConfigError as error:
    assert "No space left" in str(error), error
"""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room_kib}k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_a_directory_that_its_owner_cannot_enter_is_opened_to_him(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir(mode=0o600)
    private_directory(inner)
    assert stat.S_IMODE(inner.stat().st_mode) == 0o700
