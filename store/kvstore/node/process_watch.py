"""Whether a client's process still lives, by pidfd: a broken stream does not prove its death."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from kvstore.core.clients import Sight


def own_pid_namespace() -> int:
    """Inode of this process's PID namespace; 0 where it cannot be read."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 where it cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The name, field 2, may hold blanks and parentheses: count from its last parenthesis.
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


class ProcessWatch:
    """Tells once, through ``on_exit`` in the running loop, that a process has ended.

    ``pid``, ``pid_namespace`` and ``ticks`` are what the client said of itself. A process that
    does not answer to all three is UNSEEN: its end cannot be told.
    """

    def __init__(
        self, pid: int, pid_namespace: int, ticks: int, on_exit: Callable[[], None]
    ) -> None:
        self._on_exit = on_exit
        self._descriptor = -1
        self.sight = Sight.UNSEEN
        if not pid or not pid_namespace or pid_namespace != own_pid_namespace():
            return
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self.sight = Sight.GONE
            return
        except (OSError, OverflowError):  # no number that a process can have overflows
            return
        # Read after the pidfd is open: from here on the number cannot pass to another process.
        if not ticks or start_ticks(pid) != ticks:
            self.close()
            return
        self.sight = Sight.ALIVE
        asyncio.get_running_loop().add_reader(self._descriptor, self._ended)

    def _ended(self) -> None:
        self.close()
        self.sight = Sight.GONE
        self._on_exit()

    def close(self) -> None:
        """Stops watching."""
        if self._descriptor >= 0:
            if self.sight is Sight.ALIVE:
                asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
