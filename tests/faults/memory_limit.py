"""A memory limit around one process: a cgroup of version 1 or 2, where root can make one."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path("/sys/fs/cgroup")


class MemoryLimit:
    """``wrap`` gives a command that begins inside the limit.

    ``kind`` is ``cgroup v1``, ``cgroup v2``, or ``none`` with the ``reason`` why: then only
    ``rss_bytes`` tells what a process takes.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.kind, self.reason = "none", ""
        name = f"kvstore-test-{os.getpid()}"
        v1 = (ROOT / "memory").is_dir()
        self._folder = (ROOT / "memory" if v1 else ROOT) / name
        try:
            self._folder.mkdir()
            limit = "memory.limit_in_bytes" if v1 else "memory.max"
            (self._folder / limit).write_text(str(limit_bytes))
            self.kind = "cgroup v1" if v1 else "cgroup v2"
        except OSError as error:
            self.reason = f"no memory cgroup can be made here: {error}"
            self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command, to be started inside the limit."""
        if self.kind == "none":
            return list(command)
        enter = f'echo $$ > {self._folder}/cgroup.procs && exec "$@"'
        return ["sh", "-c", enter, "sh", *command]

    def kills(self) -> int:
        """How often the kernel killed a process for this limit."""
        if self.kind == "none":
            return 0
        name = "memory.oom_control" if self.kind == "cgroup v1" else "memory.events"
        lines = (self._folder / name).read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def rss_bytes(pid: int, kind: str) -> int:
    """Memory of a process in RAM; ``kind`` is ``Anon``, ``File`` or ``Shmem``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"Rss{kind}:"))
