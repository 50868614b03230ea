"""Build hook: compiles the client's copies where there is a C compiler; does without elsewhere."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("client/kvstore_client/_stream.c")
PLACE = "kvstore_client/_stream.so"  # in a wheel
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def compile_library(source: Path, library: Path) -> str:
    """Compiles; why it could not be done, or nothing."""
    command = os.environ.get("CC") or "cc"
    try:
        compiler = [*shlex.split(command), *FLAGS, str(source), "-o", str(library)]
        subprocess.run(compiler, check=True, capture_output=True, text=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return f"{command}: {getattr(error, 'stderr', None) or error}"
    return ""


class StreamingCopies(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``_stream.so`` to a wheel, or to the tree of an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before a wheel is built; whatever fails here leaves it without the library."""
        if self.target_name != "wheel" or not _is_known():
            return
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-build-")
        new = Path(self._folder.name) / "_stream.so"
        source = Path(self.root) / SOURCE
        why = compile_library(source, new)
        if version == "editable":
            why = why or _replace(source.with_suffix(".so"), new)
        elif not why:
            build_data["force_include"][str(new)] = PLACE
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-linux_x86_64"
            return  # the wheel is made of it
        self.finalize()
        if why:
            self.app.display_warning(f"copies will be libc's: {why.strip()}")

    def finalize(self, *_: Any) -> None:
        """After the wheel was built."""
        if folder := getattr(self, "_folder", None):
            folder.cleanup()


def _is_known() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 2**32


def _replace(library: Path, new: Path) -> str:
    """Puts a library in place of an older one, which a process may have mapped."""
    beside = library.with_suffix(f".{os.getpid()}.so")
    try:
        beside.write_bytes(new.read_bytes())
        beside.replace(library)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        return str(error)
    return ""
