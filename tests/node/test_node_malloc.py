"""I7: memory that was used once does not stay with the process."""

import platform
import subprocess
import sys

import pytest

KEPT_MAX = 6 << 20
PROGRAM = """
import numpy as np
from kvstore.node.malloc import keep_little_freed_memory
from pathlib import Path
import sys

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

if sys.argv[1] == "before":
    keep_little_freed_memory()
np.ones(24 << 20, np.uint8)  # freed at once
before = anonymous_bytes()
pieces = [np.ones(512 << 10, np.uint8) for _ in range(32)]
most = anonymous_bytes()
del pieces
if sys.argv[1] == "after":
    keep_little_freed_memory()
print(most - before, anonymous_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("when", ["before", "after"])
def test_I7_little_of_the_memory_that_was_freed_is_kept(when: str) -> None:
    """It is bounded before memory is used; or after, as a node does when it has restored."""
    out = subprocess.run([sys.executable, "-c", PROGRAM, when], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    most, kept = map(int, out.stdout.split())
    assert most >= 15 << 20
    assert kept <= KEPT_MAX, f"{kept} bytes are kept of {most}"
