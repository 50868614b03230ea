"""Interleaved rounds, ratios, and the file that a benchmark writes."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

_VERSIONED = ("kvstore", "grpcio", "protobuf", "numpy", "xxhash", "lmdb", "torch")

# Seconds that one round took; the argument is its number.
Timed = Callable[[int], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over the other's, so that more is better, for times too."""

    min: float
    median: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """The ratio over the rounds that ``values`` come from."""
        return cls(min(values), statistics.median(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of a benchmark; without ``against`` it is only reported."""

    metric: str
    value: float
    unit: str
    against: str = ""
    ratio: Ratio | None = None


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds of the same work done by us and by the other, round by round."""

    ours: list[float]
    other: list[float]

    @property
    def ratio(self) -> Ratio:
        """How much faster we are, over the rounds."""
        return Ratio.of([b / a for a, b in zip(self.ours, self.other, strict=True)])

    @property
    def median_s(self) -> float:
        """Our median round."""
        return statistics.median(self.ours)

    def rate_row(self, metric: str, nbytes: int, against: str) -> Row:
        """A row in GB/s for rounds that moved ``nbytes``."""
        other = nbytes / statistics.median(self.other) / 1e9
        return Row(
            metric, nbytes / self.median_s / 1e9, "GB/s", f"{against}: {other:.1f} GB/s", self.ratio
        )

    def throughput_row(self, metric: str, tokens: int, against: str) -> Row:
        """A row in tokens a second for rounds of ``tokens``."""
        other = tokens / statistics.median(self.other)
        value = tokens / self.median_s
        return Row(metric, value, "tokens/s", f"{against}: {other:.0f} tokens/s", self.ratio)

    def time_row(self, metric: str, against: str) -> Row:
        """A row in milliseconds, median of the rounds."""
        other = statistics.median(self.other) * 1e3
        return Row(metric, self.median_s * 1e3, "ms p50", f"{against}: {other:.3f} ms", self.ratio)


async def interleave(ours: Timed, other: Timed, *, rounds: int, warmup: int = 2) -> Rounds:
    """Runs both in turns, the first place changing, so that a slow spell of the machine hits both.

    Rounds are numbered through, warm-up included.
    """
    measured = Rounds([], [])
    for number in range(warmup + rounds):
        if number % 2:
            theirs, mine = await other(number), await ours(number)
        else:
            mine, theirs = await ours(number), await other(number)
        if number >= warmup:
            measured.ours.append(mine)
            measured.other.append(theirs)
    return measured


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
    }


def versions() -> dict[str, str]:
    """Python, the packages that matter to the figures, and whose copies the client makes."""
    # Only now: it imports gRPC, and a benchmark may have to set something before.
    from kvstore_client.streaming import streams

    found = {"python": platform.python_version(), "copies": "streamed" if streams() else "libc"}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def report(benchmark: str, rows: Sequence[Row]) -> dict[str, object]:
    """The content of a result file."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }


def write(path: Path, benchmark: str, rows: Sequence[Row]) -> None:
    """Writes the result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report(benchmark, rows), indent=2) + "\n")


def show(rows: Sequence[Row]) -> None:
    """Prints the rows for people."""
    table = Table(box=None, pad_edge=False)
    for name in ("metric", "value", "against", "ratio: min", "median", "max", "n"):
        table.add_column(name, no_wrap=True, overflow="ignore")
    for row in rows:
        ratio = row.ratio
        figures = [f"{x:.2f}" for x in (ratio.min, ratio.median, ratio.max)] if ratio else [""] * 3
        count = str(ratio.n) if ratio else ""
        table.add_row(row.metric, f"{row.value:.3f} {row.unit}", row.against, *figures, count)
    # Piped output has no width of its own, and a cut figure is of no use.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
