"""Shows the lines of the fault suites at the end of a run."""

import pytest

from tests.faults.report import PROPERTY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a suite, from every process that ran tests."""
    lines = [
        str(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in getattr(report, "user_properties", ())
        if name == PROPERTY
    ]
    if lines:
        terminalreporter.section("fault suites")
        for line in sorted(lines):
            terminalreporter.write_line(line)
