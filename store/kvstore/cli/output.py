"""How answers are shown: tables for people, JSON for programs."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvstore_proto import common_pb2
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore.config import readable_size

size = readable_size

PIPE_COLUMNS = 160
WIDTH_MAX = 10_000
LEAST_CELLS = 8
BAR_CELLS = 20
SHORT_DIGITS = 12
ENGINE_DIGITS = 8
TIER_STYLES = {"HBM": "magenta", "DRAM": "green", "SSD": "blue", "REMOTE": "yellow"}


def console(*, stderr: bool = False) -> Console:
    """Where to print; a pipe gets wide lines, so that nothing in them is cut."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    sys.stdout.flush()


def table(title: str, *columns: str) -> Table:
    """An empty table. A column whose name begins with ``>`` is right-aligned."""
    result = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        show_edge=False,
    )
    for name in columns:
        right = name.startswith(">")
        result.add_column(
            name.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    return result


class Fit(NamedTuple):
    """One way to show a table: ``build`` takes the cells of the one column that may shrink."""

    build: Callable[[int], Table]
    widest: int
    least: int = LEAST_CELLS


def print_fitting(out: Console, *fits: Fit) -> Table:
    """Prints the first table that is no wider than the terminal, and returns it.

    Where none is, the last one is cut, with ellipses.
    """
    for fit in fits:
        rows = fit.build(fit.widest)
        if (over := _width(out, rows) - out.width) > 0:
            if fit.widest - over < fit.least:
                continue
            rows = fit.build(fit.widest - over)
        out.print(rows)
        return rows
    rows = fits[-1].build(fits[-1].widest)
    out.print(rows)
    return rows


def _width(out: Console, rows: Table) -> int:
    return out.measure(rows, options=out.options.update(max_width=WIDTH_MAX)).maximum


def cut(text: str, cells: int) -> str:
    """``text`` in at most ``cells`` cells, with an ellipsis where something is left out."""
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"


def widest_of(texts: Iterable[str]) -> int:
    """Cells of the widest of these."""
    return max(map(cell_len, texts), default=0)


def print_problems(problems: Sequence[str]) -> None:
    """What an operator should look at, one a line, in words that came from a node."""
    for text in problems:
        console().print(Text(f"! {text}", style="bold red"), soft_wrap=True)


def tier_name(tier: int) -> str:
    """``DRAM`` of ``TIER_DRAM``; the number of a tier that this build does not know."""
    if tier not in common_pb2.Tier.values():
        return str(tier)
    return common_pb2.Tier.Name(common_pb2.Tier.ValueType(tier)).removeprefix("TIER_")


def end_name(reason: int) -> str:
    """``never_stored`` of ``END_REASON_NEVER_STORED``."""
    name = common_pb2.EndReason.Name(common_pb2.EndReason.ValueType(reason))
    return name.removeprefix("END_REASON_").lower()


def tier_text(tier: int) -> Text:
    """A tier's name in its colour."""
    name = tier_name(tier)
    return Text(name, style=TIER_STYLES.get(name, ""))


def short(digest: bytes) -> str:
    """The first hex digits of a root or key: enough to name it."""
    return digest.hex()[:SHORT_DIGITS]


def duration(seconds: float) -> str:
    """A time in its two largest units: ``2 h 5 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def count(number: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def bar(parts: Sequence[tuple[int, str]], total: int, cells: int = BAR_CELLS) -> Text:
    """A bar of ``cells``, filled by parts of ``total``, each in its style; not empty if > 0."""
    result = Text()
    at = filled = 0
    for value, style in parts:
        at += value
        end = max(round(cells * at / total), filled + 1) if value and total else filled
        end = min(end, cells)
        result.append("█" * (end - filled), style=style)
        filled = end
    result.append("░" * (cells - filled), style="bright_black")
    return result
