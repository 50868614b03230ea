"""F12: the wall clock of node, master and client jumps by an hour while everything waits.

A shim over the C library's wall clock (``wall_clock.c``) shifts it in all three processes at once.
Leases, time limits of acquire and reserve, the quarantine and the heartbeats go by the monotonic
clock: all of them end when they would have ended, and no lease is lost.
"""

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.faults.columns import SEED, size
from tests.faults.live import HEAL_TIMEOUT_S, ClientProcess, LiveMaster, LiveNode, Observer
from tests.faults.report import Record, finish

CLIENT = "tests.faults.clock_client"
EPISODES = size(20, 50, 50)
HOUR_S = 3600
QUARANTINE_S = 0.4
WAIT_S = 0.3
EARLY = 0.85  # of its time: the client keeps a tenth back, so that an answer is here in time
LATE_S = 3.0  # of a busy machine
HEARTBEAT_MS = 500
SOURCE = Path(__file__).with_name("wall_clock.c")


@pytest.fixture
def shifted(tmp_path: Path) -> dict[str, str]:
    """Environment of a process whose wall clock is shifted."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, cc")
    library, clock = tmp_path / "wall_clock.so", tmp_path / "shift"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    clock.write_bytes(bytes(8))
    return {"LD_PRELOAD": str(library), "KVSTORE_WALL_CLOCK": str(clock)}


def judge(seen: dict[str, Any], jump_s: float) -> list[str]:
    """What did not behave as without the jump."""
    problems = []
    if not jump_s - 1 < seen["jumped"] < jump_s + 1:
        problems.append("the clock did not jump")
    for name, wanted in (("acquire", WAIT_S), ("reserve", WAIT_S), ("quarantine", QUARANTINE_S)):
        if not EARLY * wanted <= seen[f"{name}_s"] <= wanted + LATE_S:
            problems.append(f"{name} took {seen[f'{name}_s']:.3f} s, not {wanted}")
    if seen["acquire_end"] not in ("NO_SPACE", "TIMED_OUT") or not seen["reserve_refused"]:
        problems.append("something was granted that there was no room for")
    if not seen["lease_held"]:
        problems.append("the lease was lost")
    if seen["unknown_to_master"] or not seen["asked_master"]:
        problems.append("the master lost the node")
    return problems


def has_loaded(pid: int, library: str) -> bool:
    """Whether a process has mapped the library."""
    return library in Path(f"/proc/{pid}/maps").read_text()


async def run_episodes(node: str, master: str, environ: dict[str, str]) -> list[str]:
    """All jumps; the problems that they made."""
    make, problems, shift_s = random.Random(SEED), [], 0
    arguments = (node, master, environ["KVSTORE_WALL_CLOCK"])
    async with ClientProcess.running(CLIENT, *arguments, environ=environ) as client:
        for number in range(EPISODES):
            last, shift_s = shift_s, make.choice([s for s in (-HOUR_S, 0, HOUR_S) if s != shift_s])
            client.tell(str(shift_s))
            found = judge(json.loads(await client.hear()), shift_s - last)
            problems += [f"jump {number}, {shift_s - last:+} s: {problem}" for problem in found]
    return problems


@pytest.mark.timeout(size(120, 240, 240))
async def test_F12_wall_clock_jumps(record_property: Record, shifted: dict[str, str]) -> None:
    with LiveMaster("--heartbeat-ms", str(HEARTBEAT_MS), environ=shifted) as master:
        master.start()
        flags = ("--master", master.address, "--quarantine-s", str(QUARANTINE_S))
        with LiveNode(*flags, environ=shifted) as node:
            node.start()
            for daemon in (node, master):
                assert has_loaded(daemon.pid, shifted["LD_PRELOAD"]), "the shim is not loaded"
            problems = await run_episodes(node.address, master.address, shifted)
            await Observer(node.address).idle(HEAL_TIMEOUT_S)
    print("\n".join(problems))
    finish(record_property, "F12 wall clock", jumps=EPISODES, lost=0, wrong=len(problems))
