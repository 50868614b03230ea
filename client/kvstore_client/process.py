"""Who this process is, so that the node can watch it and free what it held when it ends."""

import os
from pathlib import Path
from typing import NamedTuple

_START_TICKS_FIELD = 22 - 3  # of /proc/PID/stat, counted after the command's closing bracket


class ProcessIdentity(NamedTuple):
    """A process as its own PID namespace names it; 0 where /proc does not say."""

    pid: int
    pid_namespace: int  # inode
    start_ticks: int


def this_process(proc: Path = Path("/proc")) -> ProcessIdentity:
    """The identity of the calling process."""
    try:
        namespace = (proc / "self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    try:
        fields = (proc / "self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[_START_TICKS_FIELD])
    except (OSError, ValueError, IndexError):
        ticks = 0
    return ProcessIdentity(os.getpid(), namespace, ticks)
