"""F1: the whole cluster under faults, seed by seed; each chunk of seeds in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.columns import SEED, size
from tests.faults.report import Record, finish
from tests.sim.__main__ import run

SEEDS = size(1_000, 20_000, 200_000)
STEPS = 500
CHUNKS = 16
ROOT = Path(__file__).parents[2]
COUNTS = ("seeds", "steps", "faults", "reads", "synced_acks", "discarded", "lost", "wrong")


def simulate(*arguments: str, **environment: str) -> tuple[str, int]:
    """Output and status of ``python -m tests.sim``, without coverage, which slows it by half.

    It gives way to suites beside it, whose processes have deadlines.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("COVERAGE_", "COV_"))}
    done = subprocess.run(
        ["nice", "-n", "5", sys.executable, "-m", "tests.sim", *arguments],
        cwd=ROOT,
        env={**inherited, "KVSTORE_SEED": f"{SEED:#x}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout, done.returncode


@pytest.mark.timeout(size(600, 3600, 36_000))
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_F1_simulated_cluster_keeps_its_promises(chunk: int, record_property: Record) -> None:
    first, last = SEEDS * chunk // CHUNKS, SEEDS * (chunk + 1) // CHUNKS - 1
    output, status = simulate("--seeds", f"{first}-{last}", "--steps", str(STEPS))
    print(output)
    found = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", output)}
    counts = {name: found.get(name, 0) for name in COUNTS}
    finish(record_property, "F1 simulation", **counts)
    assert status == 0
    assert counts["steps"] == STEPS * (last + 1 - first)


def test_a_seed_replays_exactly() -> None:
    runs = {simulate("--seed", "5", PYTHONHASHSEED=seed)[0].split("trace ")[1] for seed in "012"}
    assert len(runs) == 1, runs
    assert run(5).trace_hash == runs.pop().strip()
    assert run(6).trace_hash != run(5).trace_hash


def test_a_failure_names_the_command_that_shows_it_again() -> None:
    output, status = simulate("--seeds", "0-40", KVSTORE_PLANTED_BUG="ignore-epoch")
    assert status == 1
    assert re.search(r"KVSTORE_SEED=\S+ python -m tests.sim --seed \d+ --steps 500", output)
    assert "I5" in output
