"""Copies past the caches, and the hook that compiles them."""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvstore_client import streaming

from hatch_build import SOURCE, StreamingCopies

ROOT = Path(__file__).parents[2]
SOME_BYTES = 1 << 20


def _compiles() -> bool:
    command = ["cc", "-E", "-x", "c", "-o", "/dev/null", "-"]
    try:
        return not subprocess.run(command, check=False, input=b"#include <stdlib.h>").returncode
    except OSError:
        return False


x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles nothing elsewhere")
compiles = pytest.mark.skipif(
    platform.machine() != "x86_64" or not _compiles(), reason="needs x86-64 and a C compiler"
)


@pytest.fixture(params=["streamed", "libc"])
def either_copy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "libc":
        monkeypatch.setattr(streaming, "_stream", None)
    elif not streaming.streams():
        pytest.skip("this installation has no library for copies")


@pytest.mark.parametrize("order", ["lines", "pages", "libc"])
@given(
    size=st.one_of(
        st.integers(0, 2 * streaming.STREAM_BYTES_MIN),
        st.integers(streaming.STREAM_BYTES_MIN - 70, streaming.STREAM_BYTES_MIN + 70),
        st.integers(SOME_BYTES - 20_000, SOME_BYTES),
    ),
    to=st.integers(0, 70),
    start=st.integers(0, 70),
)
def test_a_copy_changes_its_target_and_nothing_else(
    order: str, size: int, to: int, start: int
) -> None:
    stream = None if order == "libc" else streaming.load(streaming.LIBRARY, order)
    if stream is None and order != "libc":
        pytest.skip("this installation has no library for copies")
    source = np.random.default_rng(size).integers(1, 256, SOME_BYTES + 70, dtype=np.uint8)
    memory = np.zeros(SOME_BYTES + 140, dtype=np.uint8)
    with patch.object(streaming, "_stream", stream):
        streaming.copy(memory[to : to + size], source[start : start + size])
    assert np.array_equal(memory[to : to + size], source[start : start + size])
    assert not memory[:to].any()
    assert not memory[to + size :].any()


@pytest.mark.usefixtures("either_copy")
@pytest.mark.parametrize("piece", [1000, streaming.STREAM_BYTES_MIN, SOME_BYTES])
def test_a_copier_copies_the_parts_it_is_told(piece: int) -> None:
    source = np.random.default_rng(piece).integers(1, 256, SOME_BYTES, dtype=np.uint8)
    target = np.zeros(SOME_BYTES + 2, dtype=np.uint8)
    part = streaming.copier(target[1:-1], source)
    middle = SOME_BYTES // 3
    part(middle, middle + piece)
    end = min(middle + piece, SOME_BYTES)
    assert np.array_equal(target[1 + middle : 1 + end], source[middle:end])
    assert not target[: 1 + middle].any()
    assert not target[1 + end :].any()


@pytest.mark.usefixtures("either_copy")
def test_a_wrong_copy_is_refused() -> None:
    target, source = np.zeros(SOME_BYTES, np.uint8), np.ones(SOME_BYTES, np.uint8)
    with pytest.raises(ValueError, match="bytes into"):
        streaming.copy(target[:-1], source)
    with pytest.raises(ValueError, match="bytes into"):
        streaming.copy(target, source[:-1])
    target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        streaming.copy(target, source)
    assert not target.any()


@pytest.mark.usefixtures("either_copy")
def test_what_is_not_bytes_is_refused() -> None:
    some: Any = np.ones(SOME_BYTES, np.float32)
    with pytest.raises(TypeError, match="cast"):
        streaming.copy(np.zeros(SOME_BYTES, np.uint8), some)


@pytest.mark.usefixtures("either_copy")
def test_rows_are_copied_whole() -> None:
    target, source = np.zeros((1 << 18, 4), np.uint8), np.ones((1 << 18, 4), np.uint8)
    streaming.copy(target, source)
    assert target.all()


@pytest.mark.usefixtures("either_copy")
def test_memory_with_gaps_and_memory_over_itself() -> None:
    target, source = np.zeros(SOME_BYTES, np.uint8), np.ones(SOME_BYTES, np.uint8)
    streaming.copy(target[::2], source[::2])
    assert target[::2].all()
    assert not target[1::2].any()
    streaming.copy(target[: SOME_BYTES // 2], source[1::2])
    streaming.copy(target, target)
    assert target[: SOME_BYTES // 2].all()


def test_without_the_library_copies_are_libcs(tmp_path: Path) -> None:
    assert streaming.load(tmp_path / "missing.so") is None
    (tmp_path / "broken.so").write_bytes(b"no library")
    assert streaming.load(tmp_path / "broken.so") is None


@compiles
def test_where_there_is_a_compiler_copies_are_streamed() -> None:
    assert streaming.streams(), "was the compiler there when .venv was made? rm -r .venv; make venv"


@compiles
@pytest.mark.parametrize(
    "code", ["", "void kvstore_stream_copy(void) {} int kvstore_stream_supported(void) {return 0;}"]
)
def test_a_library_that_cannot_help_is_not_used(code: str, tmp_path: Path) -> None:
    library = tmp_path / "other.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, check=True, input=code.encode())
    assert streaming.load(library) is None


class Hook(StreamingCopies):
    """The hook in a tree of its own, for one target."""

    def __init__(self, root: Path, target: str = "wheel") -> None:
        self.warnings: list[str] = []
        (root / SOURCE).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / SOURCE, root / SOURCE)
        application: Any = self
        metadata: Any = None
        super().__init__(str(root), {}, None, metadata, str(root), target, application)

    def display_warning(self, message: str) -> None:
        """As the builder's application has it."""
        self.warnings.append(message)

    def run(self, version: str = "standard") -> dict[str, Any]:
        """What it adds to the build."""
        data: dict[str, Any] = {"force_include": {}}
        self.initialize(version, data)
        return data


NOTHING: dict[str, Any] = {"force_include": {}}


def copies(library: Path) -> bool:
    copy = streaming.load(library)
    assert copy is not None
    target, source = np.zeros(100_003, np.uint8), np.ones(100_003, np.uint8)
    copy(target.ctypes.data, source.ctypes.data, len(source))
    return bool(target.all())


@compiles
def test_a_wheel_gets_a_library_that_copies_and_the_tree_none(tmp_path: Path) -> None:
    hook = Hook(tmp_path)
    data = hook.run()
    assert (data["pure_python"], data["tag"]) == (False, "py3-none-linux_x86_64")
    ((library, place),) = data["force_include"].items()
    assert place == "kvstore_client/_stream.so"
    assert copies(Path(library))
    hook.finalize("standard", data, "some.whl")
    assert not Path(library).exists()
    assert [path.name for path in (tmp_path / SOURCE).parent.iterdir()] == [SOURCE.name]


@compiles
def test_an_editable_installation_gets_it_in_the_tree(tmp_path: Path) -> None:
    library = (tmp_path / SOURCE).with_suffix(".so")
    hook = Hook(tmp_path)
    library.write_bytes(b"of an older version")
    assert hook.run("editable") == NOTHING
    assert copies(library)
    assert {path.name for path in library.parent.iterdir()} == {SOURCE.name, library.name}


@x86_64
@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc", "cc '"])
@pytest.mark.parametrize("version", ["standard", "editable"])
def test_without_a_compiler_the_hook_says_so_and_goes_on(
    compiler: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    hook = Hook(tmp_path)
    assert hook.run(version) == NOTHING
    assert compiler in hook.warnings[0]
    assert [path.name for path in (tmp_path / SOURCE).parent.iterdir()] == [SOURCE.name]


@compiles
def test_a_tree_that_takes_no_library_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "")
    hook = Hook(tmp_path)
    (tmp_path / SOURCE).with_suffix(".so").mkdir()
    assert hook.run("editable") == NOTHING
    assert "directory" in hook.warnings[0]
    assert not list(tmp_path.rglob("*.[0-9]*.so"))


def test_the_hook_leaves_other_targets_and_processors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Hook(tmp_path, "sdist").run() == NOTHING
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    hook = Hook(tmp_path)
    assert hook.run() == NOTHING
    hook.finalize()
