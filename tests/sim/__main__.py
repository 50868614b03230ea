"""Runs the simulation: ``python -m tests.sim --seed 7 --trace`` or ``--seeds 0-999``.

``KVSTORE_SEED`` is the base that the seeds are counted from, as in the suites;
``KVSTORE_PLANTED_BUG`` plants a bug first.
"""

import argparse
import gc
import logging
import os
import sys
import time
import traceback

from tests.faults.columns import SEED
from tests.faults.daemons import PLANTED
from tests.sim.cluster import Cluster, Result
from tests.sim.oracle import Broken

STEPS = 500
SEEDS_SHIFT = 32  # the base is the high half of a seed


def world_seed(number: int) -> int:
    """The seed of run ``number`` under this base."""
    return (SEED << SEEDS_SHIFT) + number


def replay_command(number: int, steps: int) -> str:
    """What shows a failure again."""
    return f"KVSTORE_SEED={SEED:#x} python -m tests.sim --seed {number} --steps {steps} --trace"


def run(number: int, steps: int = STEPS, *, trace: bool = False) -> Result:
    """One seed; what is broken raises, with the command that shows it again."""
    cluster = Cluster(world_seed(number), print if trace else None)
    try:
        return cluster.run(steps)
    except Exception as error:
        at = f"step {cluster.world.steps}, {cluster.world.now:.3f} s"
        error.add_note(f"seed {number}, {at}; again with: {replay_command(number, steps)}")
        raise


def _numbers(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", "--seeds", type=_numbers, default=range(1), metavar="N or A-B")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if os.environ.get(PLANTED):
        from tests.faults.planted import plant

        plant(os.environ[PLANTED])
    lost = wrong = 0
    totals = dict.fromkeys(("seeds", "steps", "faults", "reads", "synced_acks", "discarded"), 0)
    hashes = []
    gc.freeze()  # what is imported by now need not be gone through again
    gc.disable()  # once a seed is less work than whenever it has made many objects
    start = time.process_time()
    for number in options.seed:
        try:
            result = run(number, options.steps, trace=options.trace)
        except Exception as error:
            traceback.print_exc()
            is_loss = isinstance(error, Broken) and error.lost
            lost, wrong = lost + is_loss, wrong + (not is_loss)
            if not options.keep_going:
                break
            continue
        finally:
            gc.collect()
        hashes.append(result.trace_hash)
        counts = (1, result.steps, result.faults, result.reads, result.acked, result.discarded)
        for name, count in zip(totals, counts, strict=True):
            totals[name] += count
    seconds = time.process_time() - start
    counts_text = " ".join(f"{name}={value}" for name, value in totals.items())
    print(f"{counts_text} lost={lost} wrong={wrong} cpu_s={seconds:.1f}")
    if len(hashes) == 1:
        print(f"trace {hashes[0]}")
    sys.exit(1 if lost or wrong else 0)


if __name__ == "__main__":
    main()
