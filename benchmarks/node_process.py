"""A node as a process of its own, for the time of a benchmark."""

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.errors import BenchmarkError

STOP_TIMEOUT_S = 15.0


@contextlib.contextmanager
def running_node(dram: str, *flags: str) -> Iterator[str]:
    """Address of a node with that much DRAM and no SSD tier; it ends with the context."""
    directory = Path(tempfile.mkdtemp(prefix="kvstore-bench-"))
    address = f"unix:{directory}/node.sock"
    command = [sys.executable, "-m", "kvstore.node.daemon", "--data-dir", str(directory)]
    command += ["--listen", address, "--dram", dram, "--ssd", "0", "--metrics-listen", ""]
    log = directory / "node.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, "--log-level", "warning", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        assert process.stdout is not None
        if "ready" not in process.stdout.readline():
            raise BenchmarkError(f"the node did not start: {log.read_text()[-500:].strip()}")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        shutil.rmtree(directory, ignore_errors=True)
