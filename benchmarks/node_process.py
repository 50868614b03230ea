"""A node as a process of its own, for the time of a benchmark."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.errors import BenchmarkError

STOP_TIMEOUT_S = 15.0
_TICKS = os.sysconf("SC_CLK_TCK")


class NodeProcess:
    """kvstore-node over a directory of its own, which outlives the process."""

    def __init__(
        self, directory: Path, dram: str, *flags: str, module: str = "kvstore.node.daemon"
    ) -> None:
        self.directory = directory
        self.address = f"unix:{directory}/node.sock"
        self.ready_s = 0.0  # from the start of the process to the line that says it serves
        self._command = [sys.executable, "-m", module, "--data-dir", str(directory)]
        self._command += ["--listen", self.address, "--dram", dram, "--ssd", "0"]
        self._command += ["--metrics-listen", "", "--log-level", "warning", *flags]
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        """The process; it runs between ``start`` and ``stop`` or ``kill``."""
        assert self._process is not None, "start it first"
        return self._process

    def start(self) -> None:
        """Returns when the node serves; BenchmarkError with its last words if it does not."""
        log = self.directory / "node.log"
        began = time.perf_counter()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self._process.stdout is not None
        if "ready" not in self._process.stdout.readline():
            raise BenchmarkError(f"the node did not start: {log.read_text()[-500:].strip()}")
        self.ready_s = time.perf_counter() - began

    def cpu_s(self) -> float:
        """Processor time of all its threads so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICKS

    def memory_bytes(self) -> dict[str, int]:
        """Memory that is in use, by the kernel's names: RssAnon, RssFile, RssShmem."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        fields = (line.split() for line in lines if line.startswith("Rss"))
        return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}

    def huge_shared_bytes(self) -> int:
        """Shared memory that it has mapped in huge pages."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "ShmemPmdMapped" in line)

    def directory_bytes(self) -> int:
        """Size of its directory in shared memory."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        paths = {line.split()[-1] for line in maps if "/directory-" in line}
        return sum(Path(path).stat().st_size for path in paths)

    def stop(self) -> None:
        """Ends it in good order, or at last by force."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """kill -9."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None


@contextlib.contextmanager
def running(dram: str, *flags: str, module: str = "kvstore.node.daemon") -> Iterator[NodeProcess]:
    """A node with that much DRAM and, unless ``flags`` say so, no SSD tier.

    Process and directory end with the context. ``module`` has another ``main`` for it.
    """
    directory = Path(tempfile.mkdtemp(prefix="kvstore-bench-"))
    node = NodeProcess(directory, dram, *flags, module=module)
    try:
        node.start()
        yield node
    finally:
        node.stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def running_node(dram: str, *flags: str) -> Iterator[str]:
    """The address of such a node."""
    with running(dram, *flags) as node:
        yield node.address
