"""Planted bugs: the suites count only if they catch them (``python -m tests.teeth``).

``python -m tests.faults.planted MODULE [FLAGS]`` runs a daemon with the bug that
``KVSTORE_PLANTED_BUG`` names; tests in one process call ``plant`` before they build anything.
"""

import os
import runpy
import sys
from collections.abc import Callable

from tests.faults.daemons import PLANTED

BUGS: dict[str, Callable[[], None]] = {}


def plant(name: str) -> None:
    """Replaces the right code by the wrong one, in this process, for good."""
    BUGS[name]()


def main() -> None:
    """Entry point."""
    plant(os.environ[PLANTED])
    module = sys.argv[1]
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
