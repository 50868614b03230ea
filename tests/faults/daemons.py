"""How the suites start a daemon: as people do, or with one planted bug."""

import os
import sys

PLANTED = "KVSTORE_PLANTED_BUG"


def daemon_command(module: str) -> list[str]:
    """The command of a daemon, such as ``kvstore.node.daemon``, before its flags.

    With ``KVSTORE_PLANTED_BUG=name`` in the environment the bug is planted in it first.
    """
    if os.environ.get(PLANTED):
        return [sys.executable, "-m", "tests.faults.planted", module]
    return [sys.executable, "-m", module]
