"""A real store for tests: `kvstore up` in a process group of its own."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kvstore.cli.main import main
from kvstore_client import CacheSpec, Client
from kvstore_client.blocking import BlockingNamespace

DEADLINE_S = 20.0
BLOCK_BYTES = 8192
SPEC = CacheSpec.raw("tests", block_bytes=BLOCK_BYTES, block_tokens=4)


def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition, at most DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose socket paths are short enough; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="kv-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Store:
    """A running `kvstore up`."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        command = [sys.executable, "-m", "kvstore.cli.main", "up", "--json"]
        command += ["--data-dir", str(data_dir), "--pool-dir", str(data_dir)]
        command += ["--dram", "1MiB", "--ssd", "2MiB", "--master-listen", "127.0.0.1:0"]
        command += ["--metrics-listen", "", "--master-metrics-listen", "", *options]
        self.data_dir = data_dir
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.endpoints: dict[str, str] = {}

    def ready(self) -> "Store":
        """Waits until it serves and the node has joined the master."""
        assert self.process.stdout is not None
        document = ""
        while not document.endswith("}\n"):
            line = self.process.stdout.readline()
            assert line, self.error()
            document += line
        self.endpoints = json.loads(document)
        until(lambda: self.json("status")["nodes_ready"] == 1)
        return self

    def error(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def cli(self, *arguments: str) -> str:
        """Output of a command on this store."""
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
            main([*arguments, "--master", self.endpoints["master"]])
        assert not ended.value.code
        return out.getvalue()

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json"))

    @contextlib.contextmanager
    def namespace(self) -> Iterator[BlockingNamespace]:
        with Client.connect(self.endpoints["node"], name="test") as client:
            yield client.open_namespace(SPEC)

    def children(self) -> dict[str, int]:
        """Process ids of the daemons, by name."""
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                name = next((n for n in ("master", "node") if f"kvstore.{n}.daemon" in line), "")
                found[name] = int(pid)
        return found

    def end(self, signum: int = signal.SIGTERM) -> int:
        """Sends a signal to `kvstore up` alone and waits for its exit code."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signum)
        return self.process.wait(DEADLINE_S)

    def clean_up(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def running(data_dir: Path, *options: str) -> Iterator[Store]:
    """A ready store; nothing of it is left at the end."""
    store = Store(data_dir, *options)
    try:
        yield store.ready()
    finally:
        store.clean_up()
