"""Starts and stops the store and the engine, and nothing else on the machine."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


class ClusterError(Exception):
    """The cluster cannot go on; the message says why and where the log is."""


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the new process: SIGTERM when the parent is gone, even by kill -9."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Process:
    """One command in a process group of its own, its output in a log file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._killed = False
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def check_alive(self) -> None:
        """Raises ClusterError if the process has ended."""
        if (code := self._popen.poll()) is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
            raise ClusterError(f"{self.name} ended with exit code {code}; {self.log} ends:\n{tail}")

    def kill(self) -> None:
        """kill -9 of the whole group; once, for its id may soon be another's."""
        if self._killed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._killed = True

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to what is left of the group after a while."""
        if self._popen.poll() is None:
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(STOP_TIMEOUT_S)
        self.kill()


class Cluster:
    """`kvstore up` and one engine; commands go through the same CLI that people use."""

    def __init__(self, data: Path, logs: Path, model: str) -> None:
        self.data = data
        self.logs = logs
        self.model = model
        self.master = f"127.0.0.1:{free_port()}"
        self.node = f"unix:{data}/node.sock"
        self.url = f"http://127.0.0.1:{free_port()}"
        self._processes: list[Process] = []  # known before they are ready, so that stop ends all
        self._engine: Process | None = None

    def start_store(self) -> None:
        """Master and node, up to the moment when the node is ready at the master."""
        command = [sys.executable, "-m", "kvstore.cli.main", "up"]
        command += ["--data-dir", str(self.data), "--dram", "1GiB", "--ssd", "3GiB"]
        command += ["--listen", self.node, "--master-listen", self.master]
        command += ["--metrics-listen", "", "--master-metrics-listen", ""]
        store = self._launch("kvstore up", command, self.logs / "store.log")
        self._wait(store, lambda: self.status()["nodes_ready"] == 1)

    def start_engine(self) -> None:
        """A fresh engine process, up to the moment when it is healthy."""
        self._engine = self.launch_engine(self.url, "engine", connector=True)

    def launch_engine(self, url: str, name: str, *, connector: bool) -> Process:
        """Starts an engine at ``url``, with or without the store; returns when it is healthy."""
        command = [sys.executable, "-m", "kvstore_engine.server.main", "--model", self.model]
        command += ["--port", url.rpartition(":")[2], "--kv-memory", "1GiB"]
        if connector:
            transfer = {
                "kv_connector": "KVStoreConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"node": self.node},
            }
            command += ["--kv-transfer-config", json.dumps(transfer)]
        engine = self._launch(f"kvstore-engine ({name})", command, self.logs / f"{name}.log")
        self._wait(engine, lambda: httpx.get(f"{url}/health").status_code == 200)
        return engine

    def restart_engine(self) -> None:
        """Ends the engine, its pages with it, and starts another."""
        if self._engine:
            self._engine.stop()
        self.start_engine()

    def kill_everything(self) -> None:
        """kill -9 of engine, master and node at once."""
        for process in reversed(self._processes):
            process.kill()
        self._processes.clear()

    def stop(self) -> None:
        """Ends all that this object started."""
        for process in reversed(self._processes):
            process.stop()
        self._processes.clear()

    def cli(self, *arguments: str) -> str:
        """Output of a `kvstore` command."""
        command = [sys.executable, "-m", "kvstore.cli.main", *arguments, "--master", self.master]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise ClusterError(
                f"kvstore {' '.join(arguments)}: {done.stderr.strip() or done.stdout}"
            )
        return done.stdout

    def status(self) -> dict[str, int]:
        """`kvstore status --json`."""
        status: dict[str, int] = json.loads(self.cli("status", "--json"))
        return status

    def wait_persisted(self) -> None:
        """Waits until every block in DRAM is on SSD too."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            blocks = {
                t["tier"]: t["blocks"] for t in json.loads(self.cli("status", "--json"))["tiers"]
            }
            if blocks.get("DRAM", 0) <= blocks.get("SSD", 0):
                return
            time.sleep(0.2)
        raise ClusterError(f"blocks did not reach the SSD within 60 s; see {self.logs}/store.log")

    def empty_dram(self) -> None:
        """Evicts the DRAM tier; the blocks stay on SSD."""
        self.wait_persisted()
        self.cli("evict", "--tier", "dram")

    def _launch(self, name: str, command: Sequence[str], log: Path) -> Process:
        process = Process(name, command, log)
        self._processes.append(process)
        return process

    @staticmethod
    def _wait(process: Process, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            process.check_alive()
            with contextlib.suppress(httpx.TransportError, ClusterError):
                if ready():
                    return
            time.sleep(0.1)
        raise ClusterError(f"{process.name} was not ready within {START_TIMEOUT_S:.0f} s")
