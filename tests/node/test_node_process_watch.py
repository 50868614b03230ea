import asyncio
import os
import subprocess
import sys

import pytest
from kvstore.core.clients import Sight
from kvstore.node.process_watch import ProcessWatch, own_pid_namespace, start_ticks


@pytest.fixture
def child() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


async def test_exit_of_a_process_is_told_at_once(child: "subprocess.Popen[bytes]") -> None:
    told = asyncio.Event()
    watch = ProcessWatch(child.pid, own_pid_namespace(), start_ticks(child.pid), told.set)
    assert watch.sight.value == "alive"
    child.kill()
    async with asyncio.timeout(5):
        await told.wait()
    assert watch.sight is Sight.GONE
    child.communicate()
    watch.close()


async def test_a_closed_watch_tells_nothing(child: "subprocess.Popen[bytes]") -> None:
    told = asyncio.Event()
    watch = ProcessWatch(child.pid, own_pid_namespace(), start_ticks(child.pid), told.set)
    watch.close()
    child.kill()
    child.communicate()
    await asyncio.sleep(0)
    assert not told.is_set()


async def test_what_cannot_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pid, namespace, ticks = os.getpid(), own_pid_namespace(), start_ticks(os.getpid())
    assert namespace
    assert ticks
    for claim in ((0, namespace, ticks), (pid, 0, ticks), (pid, namespace + 1, ticks)):
        assert ProcessWatch(*claim, lambda: None).sight is Sight.UNSEEN
    for wrong in (0, ticks + 1):
        assert ProcessWatch(pid, namespace, wrong, lambda: None).sight is Sight.UNSEEN

    def refuse(_pid: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert ProcessWatch(pid, namespace, ticks, lambda: None).sight is Sight.UNSEEN


async def test_a_process_that_ended_before(child: "subprocess.Popen[bytes]") -> None:
    ticks = start_ticks(child.pid)
    child.kill()
    child.communicate()
    watch = ProcessWatch(child.pid, own_pid_namespace(), ticks, lambda: None)
    assert watch.sight is Sight.GONE
    assert start_ticks(child.pid) == 0


def test_a_host_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: str) -> os.stat_result:
        raise PermissionError

    monkeypatch.setattr(os, "stat", refuse)
    assert own_pid_namespace() == 0
