"""The engine's end of the sockets to the server, when the server stands still or has ended."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq
from kvstore_engine import engine_process
from kvstore_engine.config import EngineConfig
from kvstore_engine.engine_process import Channel
from kvstore_engine.messages import RequestOutput
from kvstore_engine.wire import Launch, decode_from_engine

DEADLINE_S = 20.0
OUTPUT = RequestOutput("a" * 1000, list(range(100)))


@dataclass
class Stuck:
    """A channel whose server takes nothing, and a thread that has sent until nothing went."""

    channel: Channel
    server: "zmq.Socket[bytes]"
    parent: int  # the write end of what stands for the parent's life
    sender: threading.Thread
    sent: int = 0


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    monkeypatch.setattr(engine_process, "STUCK_LOOK_MS", 20)
    context = zmq.Context()
    server, requests = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    server.setsockopt(zmq.RCVHWM, 1)
    server.bind(f"ipc://{tmp_path}/out")
    requests.bind(f"ipc://{tmp_path}/in")
    alive, parent = os.pipe()
    launch = Launch(EngineConfig("x"), f"ipc://{tmp_path}/in", f"ipc://{tmp_path}/out")
    channel = Channel(launch, alive)
    waiting = threading.Event()

    class Room:
        """Tells when the sender has begun to wait."""

        def poll(self, timeout_ms: int) -> list[tuple[object, int]]:
            waiting.set()
            return room.poll(timeout_ms)

    room, channel._room = channel._room, Room()  # type: ignore[assignment]

    def send_until_stuck() -> None:
        while not waiting.is_set():
            channel.send(OUTPUT)
            rig.sent += 1

    rig = Stuck(channel, server, parent, threading.Thread(target=send_until_stuck))
    rig.sender.start()
    assert waiting.wait(DEADLINE_S)
    yield rig
    os.close(parent)
    rig.sender.join(DEADLINE_S)
    channel.close()
    os.close(alive)
    context.destroy(linger=0)


def test_a_server_that_stood_still_gets_everything_when_it_goes_on(stuck: Stuck) -> None:
    seen = 0
    deadline = time.monotonic() + DEADLINE_S
    while (stuck.sender.is_alive() or seen < stuck.sent) and time.monotonic() < deadline:
        if stuck.server.poll(100):
            assert decode_from_engine(stuck.server.recv()) == [OUTPUT]
            seen += 1
    assert seen == stuck.sent > 1


def test_one_who_is_told_to_stop_waits_for_nobody(stuck: Stuck) -> None:
    stuck.channel.closing = True
    stuck.sender.join(DEADLINE_S)
    assert not stuck.sender.is_alive()


def test_the_end_of_the_server_ends_the_wait_for_it(stuck: Stuck) -> None:
    os.write(stuck.parent, b"x")
    stuck.sender.join(DEADLINE_S)
    assert not stuck.sender.is_alive()
