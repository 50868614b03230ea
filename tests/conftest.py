"""What every process that runs tests does first, and the lines of the fault suites at the end."""

import os
import signal
from pathlib import Path

import pytest

from tests.faults.daemons import PLANTED
from tests.faults.report import PROPERTY, merged

LINES_FILE = "KVSTORE_SUITE_LINES"  # a file to which the lines are written as well


def pytest_sessionstart() -> None:
    """In every process that runs tests, before it imports one."""
    # A shell without job control starts what runs in the background deaf to SIGINT, and every
    # process that a test starts and interrupts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if name := os.environ.get(PLANTED):
        from tests.faults.planted import plant

        plant(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First, and so by one worker, what needs a large model: each that takes a part loads it."""
    items.sort(key=lambda item: item.get_closest_marker("weights") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a suite, from every process that ran tests."""
    lines = merged(
        str(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in getattr(report, "user_properties", ())
        if name == PROPERTY
    )
    if lines:
        terminalreporter.section("fault suites")
        for line in lines:
            terminalreporter.write_line(line)
    if path := os.environ.get(LINES_FILE):
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
