"""A real node in a process of its own, and real engines beside it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore_connector.bundled import KVStoreConnector
from kvstore_engine.build import build_engine
from kvstore_engine.config import parse_engine_config
from kvstore_engine.engine import Engine
from kvstore_engine.messages import AddRequest, CacheUsage, SamplingParams

PAGE_TOKENS = 16


class NodeProcess:
    """``kvstore-node`` with small tiers in a directory with a short path."""

    def __init__(self, *, dram: str = "16MiB", ssd: str = "0") -> None:
        self.home = Path(tempfile.mkdtemp(prefix="kvstore-test-"))
        self.pool_dir = tempfile.mkdtemp(prefix="kvstore-test-", dir="/dev/shm")
        self.address = f"unix:{self.home}/node.sock"
        self._flags = [
            *("--data-dir", str(self.home), "--pool-dir", self.pool_dir, "--dram", dram),
            *("--ssd", ssd, "--metrics-listen", "", "--log-level", "warning"),
        ]
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        """Starts it (again) and waits until it serves."""
        command = [sys.executable, "-m", "kvstore.node.daemon", *self._flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "ready" not in line:
            self.close()
            raise AssertionError(f"the node did not start: {line!r}")
        return self.process

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; after SIGKILL it is gone."""
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self._reap()

    def stop(self) -> None:
        """Ends it in an orderly way."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self._reap()

    def close(self) -> None:
        """Ends it and removes all its files."""
        if self.process.poll() is None:
            self.stop()
        self._reap()
        shutil.rmtree(self.home)
        shutil.rmtree(self.pool_dir)

    def _reap(self) -> None:
        self.process.wait(15)
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Answer:
    """What an engine said to one prompt."""

    tokens: list[int] = field(default_factory=list)
    cache: CacheUsage | None = None
    finished: bool = False

    @property
    def usage(self) -> CacheUsage:
        """The cached prefix; every answer has it."""
        assert self.cache is not None
        return self.cache


class EngineRig:
    """An engine in this process, its cache in the store at ``node`` (or nowhere)."""

    def __init__(self, node: str | None, **extra: Any) -> None:
        values: dict[str, object] = {
            "model": "tiny-random",
            "page_tokens": PAGE_TOKENS,
            "num_pages": 256,
            "max_context": 1024,
            "max_batch_tokens": 128,
            "torch_threads": 1,
            "warm_up": False,
        }
        if node is not None:
            values["kv_transfer_config"] = {
                "kv_connector": "KVStoreConnector",
                "kv_connector_extra_config": {"node": node, **extra},
            }
        self.engine: Engine = build_engine(parse_engine_config(values))
        self.engine.start()
        self.answers: dict[str, Answer] = {}
        self._sent = 0

    @property
    def connector(self) -> KVStoreConnector:
        """The connector under the engine."""
        connector = self.engine.transfers.connector
        assert isinstance(connector, KVStoreConnector)
        return connector

    def submit(self, prompt: list[int], max_tokens: int = 8) -> str:
        """Adds a greedy request."""
        self._sent += 1
        name = f"request-{self._sent}"
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(AddRequest(name, prompt, params))
        self.answers[name] = Answer()
        return name

    def step(self) -> None:
        """One step, whose outputs go to ``answers``."""
        for output in self.engine.step():
            answer = self.answers[output.request_id]
            answer.tokens += output.tokens
            answer.cache = output.cache or answer.cache
            if output.finish_reason is not None:
                assert output.finish_reason == "length", output
                answer.finished = True
        if (wait_s := self.engine.wait_s()) != 0.0:
            time.sleep(min(wait_s or 0.005, 0.005))

    def finish(self, *names: str, timeout_s: float = 30.0) -> list[Answer]:
        """Steps until these requests have ended."""
        deadline_s = time.monotonic() + timeout_s
        answers = [self.answers[name] for name in names]
        while not all(answer.finished for answer in answers):
            assert time.monotonic() < deadline_s, f"one of {names} did not end"
            self.step()
        return answers

    def ask(self, *prompts: list[int]) -> list[Answer]:
        """Runs prompts to their end, side by side."""
        return self.finish(*[self.submit(prompt) for prompt in prompts])

    def saved(self, blocks: int, timeout_s: float = 10.0) -> None:
        """Steps until this many blocks are in the store."""
        deadline_s = time.monotonic() + timeout_s
        while self.connector.counters().get("connector_saved_blocks", 0) < blocks:
            assert time.monotonic() < deadline_s, self.connector.counters()
            self.engine.step()
            time.sleep(0.005)

    def connected(self, timeout_s: float = 10.0) -> None:
        """Steps until the node answers."""
        deadline_s = time.monotonic() + timeout_s
        while not self.connector.connected:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def close(self) -> None:
        """Ends the engine and its connector."""
        self.engine.close()


def flip_bytes(path: Path, step: int = 4096) -> None:
    """Changes one byte in every ``step``, and so every block in the file."""
    with path.open("r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for at in range(17, size, step):
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 0xFF]))
