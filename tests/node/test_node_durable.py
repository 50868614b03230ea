import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvstore.durable import write_durably
from kvstore.errors import ConfigError
from kvstore.faultpoint import enable_faultpoints, faultpoint


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    enable_faultpoints({})


def arm(value: str) -> None:
    enable_faultpoints({"KVSTORE_FAULTPOINTS": value})


def test_faultpoints_are_inert_unless_enabled() -> None:
    enable_faultpoints({})
    faultpoint("durable.file")


def test_faultpoint_fails_at_the_pass_that_is_named() -> None:
    arm("here:eio@2,here:enospc@3,there:eio")
    faultpoint("here")
    with pytest.raises(OSError, match="Input/output error"):
        faultpoint("here")
    with pytest.raises(OSError, match="No space left"):
        faultpoint("here")
    faultpoint("here")


@pytest.mark.parametrize("value", ["here", "here:burn", "here:eio@x"])
def test_malformed_faultpoints_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="KVSTORE_FAULTPOINTS"):
        arm(value)


def test_write_durably_replaces_and_keeps_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"one")
    write_durably(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["file", "rename"])
def test_I3_failed_write_leaves_the_old_file(tmp_path: Path, step: str) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    arm(f"durable.{step}:enospc")
    with pytest.raises(OSError, match="No space left"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("step", "expected"), [("file", b"old"), ("rename", b"old"), ("directory", b"new")]
)
def test_I8_killed_write_leaves_old_or_new(tmp_path: Path, step: str, expected: bytes) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    program = (
        "import os, sys; from pathlib import Path\n"
        "from kvstore.durable import write_durably\n"
        "from kvstore.faultpoint import enable_faultpoints\n"
        "enable_faultpoints(os.environ)\n"
        "write_durably(Path(sys.argv[1]), b'new')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "KVSTORE_FAULTPOINTS": f"durable.{step}:kill"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == expected


def test_I3_order_is_file_then_name_then_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def fsync(descriptor: int) -> None:
        steps.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def replace(source: Path, target: Path) -> None:
        steps.append(f"rename to {target.name}")
        os.rename(source, target)

    monkeypatch.setattr("kvstore.durable.os.fsync", fsync)
    monkeypatch.setattr("kvstore.durable.os.replace", replace)
    write_durably(tmp_path / "file", b"new")
    temporary, renamed, directory = steps
    assert temporary.startswith("fsync .file.")
    assert (renamed, directory) == ("rename to file", f"fsync {tmp_path.name}")
