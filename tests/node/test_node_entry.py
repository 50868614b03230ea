"""What a daemon sets before it imports gRPC and numpy."""

import os
import subprocess
import sys

import pytest
from kvstore import entry

CALL = """
import os
from kvstore.entry import wake_few_threads

wake_few_threads()
import grpc

grpc.insecure_channel("unix:/nowhere").close()
print(os.environ["GRPC_EXPERIMENTS"])
"""


def test_the_installed_grpc_knows_what_it_is_told() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", CALL], capture_output=True, text=True, check=True, env=environment
    )
    assert "xperiment" not in done.stderr
    assert done.stdout.strip() == entry.GRPC_EXPERIMENTS


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTS", "")
    entry.wake_few_threads()
    assert not os.environ["GRPC_EXPERIMENTS"]


NUMPY = """
import os
from kvstore.entry import start_small

start_small()
import numpy as np

print(np._core.multiarray._get_madvise_hugepage(), len(os.listdir("/proc/self/task")))
"""


def test_numpy_of_a_daemon_takes_no_huge_pages_and_no_threads() -> None:
    names = ("NUMPY_MADVISE_HUGEPAGE", "OPENBLAS_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    done = subprocess.run(
        [sys.executable, "-c", NUMPY], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["False", "1"]
