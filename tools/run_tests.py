"""Runs every test on all cores with branch coverage, and holds the coverage to its floors.

python -m tools.run_tests [pytest arguments]
"""

import json
import os
import subprocess
import sys
from pathlib import Path

BUILD = Path("build")
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


def main() -> None:
    """Entry point."""
    BUILD.mkdir(exist_ok=True)
    run("coverage", "erase")
    workers = str(max(2, os.cpu_count() or 2))
    arguments = sys.argv[1:] or ["-n", workers, "--dist", "worksteal", "--durations", "15"]
    failed = run("coverage", "run", "-m", "pytest", "-m", "not slow", *arguments)
    if failed:
        sys.exit(failed)
    if not check_coverage():
        sys.exit("coverage is under its floor")


if __name__ == "__main__":
    main()
