"""Runs the tests on all cores, and shows the lines of the fault suites at the end.

python -m tools.run_tests [pytest arguments]   every test, with branch coverage and its floors
python -m tools.run_tests --full [arguments]   the fault suites in their full column
"""

import json
import os
import subprocess
import sys
from pathlib import Path

BUILD = Path("build")
LINES_FILE = BUILD / "suites.txt"
# The longest single test first: one worker would be left alone with it at the end.
FULL_SUITES = ("tests/store/test_store_model.py", "tests/sim", "tests/faults")
FLOORS = {
    "store/kvstore/core/ and client/": (("store/kvstore/core/", "client/"), 95.0),
    "everything": (("",), 85.0),
}


def run(*arguments: str) -> int:
    """Runs a module of this interpreter; its exit code."""
    return subprocess.run([sys.executable, "-m", *arguments], check=False).returncode


Summaries = dict[str, dict[str, int]]


def percent(files: Summaries, prefixes: tuple[str, ...]) -> float:
    """Covered lines and branches of the files under any of ``prefixes``, in percent."""
    covered = total = 0
    for name, summary in files.items():
        if name.startswith(prefixes):
            covered += summary["covered_lines"] + summary["covered_branches"]
            total += summary["num_statements"] + summary["num_branches"]
    return 100.0 * covered / max(total, 1)


def check_coverage() -> bool:
    """Prints the report and whether each floor holds."""
    run("coverage", "combine", "-q")
    run("coverage", "report", "--sort=cover")
    run("coverage", "json", "-q", "-o", str(BUILD / "coverage.json"))
    report = json.loads((BUILD / "coverage.json").read_text())
    files = {name: entry["summary"] for name, entry in report["files"].items()}
    held = True
    for name, (prefixes, floor) in FLOORS.items():
        value = percent(files, prefixes)
        held &= value >= floor
        print(f"coverage of {name}: {value:.1f} % (floor {floor:.0f} %)")
    return held


def show_lines() -> None:
    """One line a suite, after everything else."""
    if LINES_FILE.exists():
        print(LINES_FILE.read_text(encoding="utf-8"), end="")


def run_full(arguments: list[str]) -> None:
    """The fault suites in their full column, or in the one that KVSTORE_COLUMN names."""
    os.environ.setdefault("KVSTORE_COLUMN", "full")
    failed = run("pytest", *arguments, *FULL_SUITES)
    show_lines()
    sys.exit(failed)


def main() -> None:
    """Entry point."""
    BUILD.mkdir(exist_ok=True)
    LINES_FILE.unlink(missing_ok=True)
    os.environ["KVSTORE_SUITE_LINES"] = str(LINES_FILE.absolute())
    workers = max(2, os.cpu_count() or 2)
    spread = ["--dist", "worksteal", "--durations", "15", "-n"]
    if sys.argv[1:2] == ["--full"]:
        # One more than cores: suites wait for disks and for processes that start, and the
        # simulation, at a low priority, takes the time that they leave.
        run_full(sys.argv[2:] or [*spread, str(workers + 1)])
    run("coverage", "erase")
    arguments = sys.argv[1:] or [*spread, str(workers)]
    failed = run("coverage", "run", "-m", "pytest", "-m", "not slow", *arguments)
    held = not failed and check_coverage()
    show_lines()
    if failed:
        sys.exit(failed)
    if not held:
        sys.exit("coverage is under its floor")


if __name__ == "__main__":
    main()
