"""Ctrl-C and a closed terminal: no traceback, nothing left behind."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.store import DEADLINE_S, Store, running, short_directory, until

# Ctrl-C comes while a command loads `late`, one of the last modules that it needs.
INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
module, late = sys.argv[1:3]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == late:
            os.kill(os.getpid(), signal.SIGINT)
        return None
sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["up"]
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("kvstore.cli.main", "typer"),
        ("kvstore.cli.main", "kvstore.cli.version"),
        ("kvstore.node.daemon", "grpc"),
        ("kvstore.node.daemon", "kvstore.node.service"),
        ("kvstore.master.daemon", "grpc"),
        ("kvstore.master.daemon", "kvstore.master.service"),
        ("kvstore_engine.server.main", "uvicorn"),
        ("kvstore_engine.server.main", "kvstore_engine.server.service"),
    ],
)
def test_an_interrupt_while_modules_load_is_quiet(module: str, late: str) -> None:
    if module.startswith("kvstore_engine"):
        pytest.importorskip("kvstore_engine.tokenizer")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, module, late],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("name", ["master", "node"])
def test_an_interrupt_while_a_daemon_starts_is_quiet(name: str) -> None:
    with short_directory() as data_dir:
        store = Store(data_dir)
        try:
            until(lambda: name in store.children())
            os.killpg(store.process.pid, signal.SIGINT)
            assert store.process.wait(DEADLINE_S) == 130
            assert store.error() == ""
            assert not list(data_dir.rglob("pool-*"))
        finally:
            store.clean_up()


def test_an_interrupt_on_the_terminal_stops_a_running_store() -> None:
    with short_directory() as data_dir, running(data_dir) as store:
        os.killpg(store.process.pid, signal.SIGINT)
        assert store.process.wait(DEADLINE_S) == 0
        assert store.error() == ""


def test_I7_nothing_stays_when_the_terminal_is_closed() -> None:
    with short_directory() as data_dir:
        pid, terminal = pty.fork()
        if pid == 0:  # the leader of a session, with this terminal
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
            arguments = ["--data-dir", str(data_dir), "--pool-dir", str(data_dir), "--ssd", "0"]
            arguments += ["--dram", "1MiB", "--master-listen", "127.0.0.1:0"]
            arguments += ["--metrics-listen", "", "--master-metrics-listen", ""]
            os.execv(sys.executable, [sys.executable, "-m", "kvstore.cli.main", "up", *arguments])
        try:
            shown = b""
            while b"Look into it" not in shown:
                shown += os.read(terminal, 4096)
            assert list(data_dir.rglob("pool-*"))
            assert (data_dir / "node.sock").is_socket()
            os.close(terminal)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert not list(data_dir.rglob("pool-*"))
            assert not (data_dir / "node.sock").exists()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with short_directory() as data_dir, running(data_dir) as store:
            for pid in (store.process.pid, *store.children().values()):
                os.kill(pid, signal.SIGHUP)
            assert store.json("status")["nodes_ready"] == 1
            assert store.end() == 0
    finally:
        signal.signal(signal.SIGHUP, before)
