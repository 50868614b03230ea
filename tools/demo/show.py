"""The live table and the bars of the demo."""

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tools.demo.results import CASES, Case

WHAT = {
    "cold": "nothing cached",
    "hbm": "same engine",
    "dram": "fresh engine",
    "ssd": "DRAM emptied",
    "restart": "after kill -9",
    "shared": "another chat",
}
COLOURS = {"cold": "red", "hbm": "green", "dram": "green", "ssd": "yellow", "restart": "yellow"}
BAR_COLUMNS = 16


def source_text(case: Case) -> str:
    """Tokens by tier, such as ``dram 3,968``."""
    parts = [f"{tier} {n:,}" for tier, n in case.tokens_by_tier.items() if n]
    return ", ".join(parts) or "none"


def bar_cells(share: float) -> str:
    """``share`` of BAR_COLUMNS in half cells: at least one, and never more than all."""
    halves = min(max(round(2 * BAR_COLUMNS * share), 1), 2 * BAR_COLUMNS)
    return "━" * (halves // 2) + "╸" * (halves % 2)


class Screen:
    """A table that fills while the demo goes on; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._cases: dict[str, Case] = {}
        self._doing = "starting"
        self._since = time.monotonic()
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=8, transient=False
        )

    def __enter__(self) -> "Screen":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._doing = ""
        if self.console.is_terminal:
            self._live.stop()
        else:
            self.console.print(self._table())

    def doing(self, what: str) -> None:
        """Names the step that runs now."""
        self._doing, self._since = what, time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"… {what}")

    def add(self, case: Case) -> None:
        """A case has its result."""
        self._cases[case.name] = case
        if not self.console.is_terminal:
            self.console.print(
                f"  {case.name}: first token after {case.ttft_s:.3f} s, "
                f"{case.cached_tokens:,} of {case.prompt_tokens:,} tokens cached "
                f"({source_text(case)})"
            )

    def _table(self) -> Table:
        table = Table(
            title=self._title(),
            title_justify="left",
            title_style="bold",
            box=None,
            padding=(0, 1),
        )
        table.add_column("case", no_wrap=True)
        table.add_column("what", no_wrap=True)
        table.add_column("TTFT", justify="right", no_wrap=True)
        table.add_column("", width=BAR_COLUMNS)
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("cached from", no_wrap=True)
        cold = self._cases["cold"].ttft_s if "cold" in self._cases else 0.0
        for name in CASES:
            table.add_row(*self._row(name, cold))
        return table

    def _title(self) -> str:
        if not self._cases:
            return "Time to first token (TTFT)"
        tokens = self._cases["cold"].prompt_tokens
        return f"Time to first token (TTFT) of a prompt of {tokens:,} tokens"

    def _row(self, name: str, cold: float) -> list[RenderableType]:
        case = self._cases.get(name)
        if case is None:
            return [Text(name, "dim"), Text(WHAT[name], "dim"), "", "", "", ""]
        bar = Text(bar_cells(case.ttft_s / cold), COLOURS.get(name, "cyan"))
        faster = "" if name == "cold" else f"{cold / case.ttft_s:.0f} x"
        return [name, WHAT[name], f"{case.ttft_s:.3f} s", bar, faster, source_text(case)]

    def _render(self) -> RenderableType:
        if not self._doing:
            return self._table()
        elapsed = time.monotonic() - self._since
        return Group(self._table(), Spinner("dots", text=f" {self._doing}  {elapsed:.0f} s"))
