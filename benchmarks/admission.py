"""SSD admission policies on traces: hit rate and blocks written, by simulation of the node's core.

The real NodeCore runs without I/O: every disk request ends at once. Nothing is timed.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvstore.core.admission import ADMISSIONS
from kvstore.core.directory import DirectoryWriter
from kvstore.core.effects import Effects, End, Reserved
from kvstore.core.node_core import NodeCore
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, CoreConfig, IoOutcome, ReserveStatus

from benchmarks.harness import Ratio, Row

ROUNDS = 1
TRACE = Path(__file__).parent / "traces" / "mooncake_conversation.csv"
BLOCK_BYTES = 4096  # of the simulation; only counts of blocks matter
DRAM_BLOCKS = 1_000
SSD_BLOCKS = (5_000, 10_000, 40_000)
SYNTHETIC_SSD_BLOCKS = 10_000
SYNTHETIC_REQUESTS = 6_000
SESSION = 1
DIRECTORY_ENTRIES = 1 << 18

Prompt = list[bytes]


class Outcome(NamedTuple):
    """Of one trace under one policy, in blocks."""

    asked: int
    hits: int
    written: int

    @property
    def hit_percent(self) -> float:
        """Blocks found, of all that were asked for."""
        return 100 * self.hits / self.asked


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def trace_prompts(path: Path = TRACE) -> list[Prompt]:
    """The requests of a trace as chains of keys."""
    prompts: list[Prompt] = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            shared, blocks = int(row["shared"]), int(row["blocks"])
            start = prompts[int(row["base"])][:shared] if shared else []
            prompts.append(start + [_key(f"{len(prompts)}:{i}") for i in range(shared, blocks)])
    return prompts


def synthetic_prompts(requests: int = SYNTHETIC_REQUESTS, seed: int = 1) -> Iterator[Prompt]:
    """Three of five prompts come once; the others are turns of conversations on a few openings."""
    rng = random.Random(seed)
    openings = [[_key(f"o{n}:{i}") for i in range(8)] for n in range(50)]
    talks: list[Prompt] = [[] for _ in range(400)]
    for number in range(requests):
        if rng.random() < 0.6:
            yield [_key(f"once {number}:{i}") for i in range(24)]
            continue
        place = rng.randrange(len(talks))
        talk = talks[place] or list(openings[min(49, int(rng.paretovariate(1.0)) - 1)])
        talk = talk + [_key(f"turn {number}:{i}") for i in range(4)]
        yield talk
        talks[place] = [] if len(talk) > 60 else talk


class Simulation:
    """One node under one policy."""

    def __init__(self, admission: str, ssd_blocks: int) -> None:
        dram_bytes = DRAM_BLOCKS * BLOCK_BYTES
        buffer = bytearray(DirectoryWriter.size_bytes(DIRECTORY_ENTRIES, dram_bytes))
        writer = DirectoryWriter(
            buffer, entries=DIRECTORY_ENTRIES, pool_bytes=dram_bytes, instance=1
        )
        config = CoreConfig(
            dram_bytes=dram_bytes,
            ssd_bytes=ssd_blocks * BLOCK_BYTES,
            segment_bytes=16 * BLOCK_BYTES,
            ssd_admission=admission,
        )
        self.core = NodeCore(config, writer)
        spec = CacheSpec.raw("admission", block_bytes=BLOCK_BYTES)
        self.namespace = self.core.open_namespace(spec).id
        self.core.open_session(SESSION)
        self._requests = 0

    def run(self, prompts: Iterable[Prompt]) -> Outcome:
        """Every prompt: load what is there, store the rest."""
        asked = hits = 0
        for keys in prompts:
            found = self._load(keys)
            self._store(keys[found:], keys[found - 1] if found else b"")
            asked += len(keys)
            hits += found
        self.core.check_integrity()
        return Outcome(asked, hits, self.core.counters.get("ssd_written_blocks", 0))

    def _load(self, keys: Prompt) -> int:
        self._requests += 1
        request, joined = self._requests, b"".join(keys)
        seen = self._carry_out(
            self.core.acquire(SESSION, request, self.namespace, joined, b"", 60.0, 0.0)
        )
        seen.extend(self.core.release(SESSION, request, 0, 0, 0.0))
        return next(r.body.granted for r in seen.replies if isinstance(r.body, End))

    def _store(self, keys: Prompt, parent: bytes) -> None:
        if not keys:
            return
        self._requests += 1
        reserve, joined = self._requests, b"".join(keys)
        seen = self._carry_out(
            self.core.reserve(SESSION, reserve, self.namespace, joined, parent, 0.0, 0.0)
        )
        statuses = next(r.body.statuses for r in seen.replies if isinstance(r.body, Reserved))
        slots = [i for i, status in enumerate(statuses) if status == ReserveStatus.SLOT]
        if slots:
            self._requests += 1
            sums = bytes(8 * len(slots))
            self._carry_out(
                self.core.commit(
                    SESSION, self._requests, reserve, slots, sums, AckLevel.MEMORY, 0.0
                )
            )

    def _carry_out(self, effects: Effects) -> Effects:
        """Ends every disk request at once; all that came of it, answers included."""
        seen = Effects()
        while effects:
            seen.replies += effects.replies
            following = Effects()
            if effects.reads:
                done = [(op, IoOutcome.OK) for op in effects.reads]
                following.extend(self.core.reads_done(done, 0.0))
            if effects.drops:
                following.extend(self.core.drops_done(effects.drops, 0.0))
            if effects.writes:
                following.extend(self.core.writes_done(effects.writes, True, 0.0))
            effects = following
        return seen


def compare(name: str, prompts: Sequence[Prompt], ssd_blocks: int) -> list[Row]:
    """A row for hits and one for writes of each policy, against ``always``."""
    outcomes = {policy: Simulation(policy, ssd_blocks).run(prompts) for policy in ADMISSIONS}
    always = outcomes["always"]
    rows = []
    for policy, outcome in outcomes.items():
        hits, writes = outcome.hits / always.hits, always.written / max(1, outcome.written)
        label = f"{name}_{ssd_blocks // 1000}k_{policy}"
        against = "" if policy == "always" else "always"
        rows += [
            Row(f"{label}_hits", outcome.hit_percent, "%", against, Ratio.of([hits])),
            Row(f"{label}_writes", outcome.written, "blocks", against, Ratio.of([writes])),
        ]
    return rows


def run(rounds: int) -> list[Row]:
    """All comparisons; one round tells all, as nothing is left to chance."""
    del rounds
    prompts = trace_prompts()
    rows = [row for blocks in SSD_BLOCKS for row in compare("mooncake", prompts, blocks)]
    return rows + compare("synthetic", list(synthetic_prompts()), SYNTHETIC_SSD_BLOCKS)
