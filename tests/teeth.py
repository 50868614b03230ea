"""Whether the suites bite: each planted bug has to be caught by a suite of the quick column.

python -m tests.teeth [--json FILE] [--bug NAME]... [--all] [--jobs N]

Without a bug the same suites have to pass. Exit code 0 only if they do, and every bug is caught.
Logs of all runs are in build/teeth/.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.faults.columns import SEED
from tests.faults.daemons import PLANTED
from tests.faults.planted import BUGS

LOGS = Path("build/teeth")
RUN_TIMEOUT_S = 900.0
TESTS_FAILED = 1  # pytest's exit code; others say that it could not run them

SUITES: dict[str, tuple[str, ...]] = {
    "F1": ("tests/sim",),
    "F2": ("tests/faults/test_f02_node_killed.py",),
    "F4": ("tests/faults/test_f04_client_killed.py",),
    "F5": ("tests/faults/test_f05_system_calls.py",),
    "F6": ("tests/faults/test_f06_power_loss.py",),
    "F7": ("tests/faults/test_f07_fsync_error.py",),
    "F9": ("tests/faults/test_f09_damage.py",),
    "F11": ("tests/faults/test_f11_stopped.py",),
    "F13": ("tests/faults/test_f13_slow_reader.py",),
    "F17": ("tests/store/test_store_model.py",),
}

# Suites that ought to catch a bug, the quickest first.
TABLE: dict[str, tuple[str, ...]] = {
    "skip-fsync": ("F6", "F5"),
    "ack-before-write": ("F1", "F6", "F2"),
    "skip-directory-fsync": ("F6",),
    "skip-checksum": ("F9",),
    "compare-64-bits": ("F17",),
    "visible-before-commit": ("F17", "F1", "F4", "F2"),
    "ignore-lease": ("F17", "F1", "F13", "F11"),
    "no-generation-check": ("F13", "F11"),
    "ignore-epoch": ("F1",),
    "leak-pending": ("F17", "F1", "F4", "F11"),
    "swallow-eio": ("F7", "F5"),
    "drop-tenant": ("F1",),
}


@dataclass(frozen=True)
class Run:
    """One suite with one bug, or with none (empty)."""

    bug: str
    suite: str
    seconds: float
    exit_code: int  # of pytest; -1: it did not end in time
    passed: int
    test: str = ""  # the first that failed
    message: str = ""

    @property
    def caught(self) -> bool:
        """A test failed, with the bug in place."""
        return bool(self.bug) and self.exit_code == TESTS_FAILED and bool(self.test)

    @property
    def clean(self) -> bool:
        """Every test passed, and there was one."""
        return self.exit_code == 0 and self.passed > 0


def run(bug: str, suite: str) -> Run:
    """Runs a suite in a process of its own, up to its first failure."""
    name = f"{bug or 'no-bug'}-{suite}"
    report, log = LOGS / f"{name}.xml", LOGS / f"{name}.log"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "KVSTORE_COLUMN": "quick", "KVSTORE_SEED": str(SEED)}
    environment.pop(PLANTED, None)
    if bug:
        environment[PLANTED] = bug
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-m", "not slow"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    command += SUITES[suite]
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=RUN_TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    seconds = time.monotonic() - started
    return Run(bug, suite, round(seconds, 1), code, *_first_failure(report, log))


def _first_failure(report: Path, log: Path) -> tuple[int, str, str]:
    """(tests passed, the first that failed, the first line that says why)."""
    if not report.exists():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return 0, "", last[0] if last else "no report"
    passed = 0
    for case in ET.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            if (failure := case.find(kind)) is not None:
                return passed, case.get("name", "?"), _gist(failure)
        passed += case.find("skipped") is None
    return passed, "", ""


def _gist(failure: ET.Element) -> str:
    text = failure.get("message") or failure.text or ""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def caught_by(bug: str, *, every: bool, say: Console) -> list[Run]:
    """Runs the suites of a bug, up to the first that catches it unless ``every`` is to run."""
    runs = []
    for suite in TABLE[bug]:
        runs.append(run(bug, suite))
        last = runs[-1]
        verdict = "caught" if last.caught else f"not caught (pytest exit code {last.exit_code})"
        say.print(f"{bug} by {suite}: {verdict} in {last.seconds} s", highlight=False)
        if last.caught and not every:
            break
    return runs


def baseline(suites: Iterable[str], pool: ThreadPoolExecutor, say: Console) -> list[Run]:
    """The suites without a bug."""
    runs = []
    for done in pool.map(lambda suite: run("", suite), suites):
        verdict = f"{done.passed} pass" if done.clean else f"FAILS: {done.test} {done.message}"
        say.print(f"no bug, {done.suite}: {verdict} in {done.seconds} s", highlight=False)
        runs.append(done)
    return runs


def show(bugs: Sequence[str], runs: Sequence[Run], failing: Sequence[str], say: Console) -> int:
    """Prints the table; how many bugs were caught by suites that pass without them."""
    table = Table("bug", "caught by", "in", "test", "message")
    count = 0
    for bug in bugs:
        mine = [run for run in runs if run.bug == bug]
        catching = [run for run in mine if run.caught and run.suite not in failing]
        count += bool(catching)
        for one in catching:
            table.add_row(bug, one.suite, f"{one.seconds} s", one.test, one.message[:120])
        if not catching:
            tried = ", ".join(f"{run.suite} (exit code {run.exit_code})" for run in mine)
            table.add_row(bug, "[bold red]nobody[/]", "", "", f"tried {tried}")
    say.print(table)
    return count


def write_json(path: Path, bugs: Sequence[str], clean: Sequence[Run], runs: Sequence[Run]) -> None:
    """Everything that was run."""
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "caught": sorted({run.bug for run in runs if run.caught}),
        "missed": [bug for bug in bugs if not any(r.caught and r.bug == bug for r in runs)],
        "runs": [asdict(run) | {"caught": run.caught} for run in runs],
        "without_a_bug": [asdict(run) | {"clean": run.clean} for run in clean],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.teeth", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument(
        "--bug", action="append", choices=sorted(BUGS), help="only this one; may be repeated"
    )
    parser.add_argument("--all", action="store_true", help="go on after the first suite that bites")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    options = parser.parse_args()
    bugs: list[str] = options.bug or list(BUGS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    say = Console(width=None if sys.stdout.isatty() else 160)
    LOGS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        found = pool.map(lambda bug: caught_by(bug, every=options.all, say=say), bugs)
        runs = [run for some in found for run in some]
        used = dict.fromkeys(run.suite for run in runs)
        clean = baseline(used, pool, say)
    failing = [run.suite for run in clean if not run.clean]
    count = show(bugs, runs, failing, say)
    if options.json:
        write_json(options.json, bugs, clean, runs)
    if failing:
        say.print(f"without a bug these do not pass: {', '.join(failing)}; see {LOGS}")
    say.print(f"{count} of {len(bugs)} planted bugs caught, seed={SEED:#x}", highlight=False)
    sys.exit(0 if count == len(bugs) and not failing else 1)


if __name__ == "__main__":
    main()
