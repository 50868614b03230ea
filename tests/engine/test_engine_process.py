"""The engine process as the server sees it: start, answers, failures, ways to end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from kvstore_engine.config import EngineConfig
from kvstore_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    RequestOutput,
    ResetCache,
    SamplingParams,
    Shutdown,
    ToEngine,
)
from kvstore_engine.wire import Launch, decode_from_engine, encode, encode_launch

DEADLINE_S = 40.0
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
COMMAND = [sys.executable, "-m", "kvstore_engine.engine_process"]


class Peer:
    """The server's side of one engine process."""

    def __init__(self, directory: Path) -> None:
        self.context = zmq.Context()
        self.requests = self.context.socket(zmq.PUSH)
        self.outputs = self.context.socket(zmq.PULL)
        self.endpoints = f"ipc://{directory}/requests", f"ipc://{directory}/outputs"
        self.requests.bind(self.endpoints[0])
        self.outputs.bind(self.endpoints[1])
        self.process: subprocess.Popen[bytes] | None = None
        self._received: list[FromEngine] = []

    def launch_line(self, **config: object) -> bytes:
        values: dict[str, object] = {"model": "tiny-random", "num_pages": 32, "torch_threads": 1}
        engine = EngineConfig(**(values | config))  # type: ignore[arg-type]
        return encode_launch(Launch(engine, *self.endpoints))

    def start(self, **config: object) -> FromEngine:
        """Starts the process; its first message."""
        self.process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(self.launch_line(**config))
        return self.next()

    def send(self, *messages: ToEngine) -> None:
        self.requests.send(encode(messages))

    def next(self) -> FromEngine:
        """The next message; frames hold several."""
        while not self._received:
            assert self.outputs.poll(int(DEADLINE_S * 1000)), "the engine process is silent"
            self._received = decode_from_engine(self.outputs.recv())
        return self._received.pop(0)

    def answer(self, request_id: str) -> list[RequestOutput]:
        """All outputs of one request."""
        outputs: list[RequestOutput] = []
        while not outputs or outputs[-1].finish_reason is None:
            message = self.next()
            if isinstance(message, RequestOutput) and message.request_id == request_id:
                outputs.append(message)
        return outputs

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.context.destroy(linger=0)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(tmp_path)
    yield peer
    peer.close()


def test_it_serves_and_shuts_down(peer: Peer) -> None:
    ready = peer.start(served_model_name="mine")
    assert ready == EngineReady(
        "mine", max_context=32 * 64, num_pages=32, page_tokens=64, vocab_size=260
    )
    prompt = [i % 200 for i in range(150)]
    peer.send(AddRequest("a", prompt, GREEDY), AddRequest("b", [], GREEDY))
    outputs = peer.answer("a")
    assert [len(output.tokens) for output in outputs] == [1, 1, 1, 1]
    assert outputs[0].cache is not None
    assert outputs[0].cache.hbm == 0
    peer.send(AddRequest("c", prompt, GREEDY))
    again = peer.answer("c")
    assert again[0].cache is not None
    assert again[0].cache.hbm == 128
    assert [o.tokens for o in again] == [o.tokens for o in outputs]
    peer.send(ResetCache(), AddRequest("d", prompt, GREEDY))
    reset = peer.answer("d")
    assert reset[0].cache is not None
    assert reset[0].cache.hbm == 0
    peer.send(Shutdown())
    assert peer.exit_code() == 0


def test_a_refused_request_is_answered_with_its_error(peer: Peer) -> None:
    peer.start()
    peer.send(AddRequest("a", [1] * 3000, GREEDY))
    (output,) = peer.answer("a")
    assert output.finish_reason == "error"
    assert "3000 tokens" in (output.error or "")


def test_an_abort_frees_everything(peer: Peer) -> None:
    peer.start()
    endless = SamplingParams(temperature=0.0, max_tokens=100_000, ignore_eos=True)
    peer.send(AddRequest("a", [1] * 100, endless))
    assert isinstance(wait_for(peer, lambda m: isinstance(m, RequestOutput)), RequestOutput)
    peer.send(AbortRequest("a"), AbortRequest("never heard of"))
    stats = wait_for(peer, lambda m: isinstance(m, EngineStats) and not m.running)
    assert isinstance(stats, EngineStats)
    assert stats.pages_free == stats.pages_total
    assert stats.labelled["finished"]["abort"] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"num_pages": 1}, "num_pages is 1"),
        (
            {"kv_transfer_config": {"kv_connector": "x", "kv_connector_module_path": "nowhere"}},
            "nowhere",
        ),
        ({"max_context": 100_000_000}, "made for 8192 tokens"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "KVStoreConnector",
                    "kv_connector_extra_config": {"node": "bogus"},
                }
            },
            "node is 'bogus'",
        ),
    ],
    ids=["model", "pages", "connector", "context", "node"],
)
def test_wrong_input_ends_it_with_2(peer: Peer, config: dict[str, object], message: str) -> None:
    failed = peer.start(**config)
    assert isinstance(failed, EngineFailed)
    assert failed.usage
    assert message in failed.message
    assert peer.exit_code() == 2


def test_no_launch_line_ends_it_with_a_message() -> None:
    done = subprocess.run(COMMAND, input=b"{}\n", capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert b"launch line" in done.stderr
    assert b"Traceback" not in done.stderr


def test_sigterm_ends_it_and_sigint_does_not(peer: Peer) -> None:
    peer.start()
    assert peer.process is not None
    peer.process.send_signal(signal.SIGINT)
    peer.send(AddRequest("a", [1, 2, 3], GREEDY))
    assert peer.answer("a")[-1].finish_reason == "length"
    peer.process.send_signal(signal.SIGTERM)
    assert peer.exit_code() == 0


def test_it_ends_when_its_parent_is_killed(peer: Peer, tmp_path: Path) -> None:
    line = tmp_path / "line"
    line.write_bytes(peer.launch_line())
    script = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen({COMMAND!r}, stdin=open({str(line)!r}, 'rb'))\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout as stdout:
        child = os.pidfd_open(int(stdout.readline()))
    try:
        assert isinstance(peer.next(), EngineReady)
        parent.kill()
        parent.wait()
        poller = zmq.Poller()
        poller.register(child, zmq.POLLIN)
        assert poller.poll(int(DEADLINE_S * 1000)), "the engine process outlived its parent"
    finally:
        os.close(child)


def wait_for(peer: Peer, condition: Callable[[FromEngine], bool]) -> FromEngine:
    """The first message that fulfils ``condition``."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        message = peer.next()
        if condition(message):
            return message
    raise AssertionError("the awaited message did not come")
