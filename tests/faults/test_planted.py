import os
import subprocess
import sys

import pytest
from kvstore.core.epoch import EpochGuard
from kvstore.errors import StaleEpochError

from tests.faults.daemons import PLANTED
from tests.faults.mutation import Mutation, mutate
from tests.faults.planted import BUGS, plant

GUARD = "kvstore.core.epoch:EpochGuard.admit"
USES_AN_OLD_EPOCH = """
from kvstore.core.epoch import EpochGuard
import tests.faults.planted as planted
admit = EpochGuard().admit
planted.plant("ignore-epoch")
admit(2)
admit(1)
"""


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_are_twelve_and_each_finds_the_code_that_it_changes() -> None:
    assert len(BUGS) == 12
    checked = run("-m", "tests.faults.planted", "--check")
    assert checked.returncode == 0, checked.stderr


def test_a_planted_function_is_changed_for_those_who_hold_it_already() -> None:
    assert run("-c", USES_AN_OLD_EPOCH).returncode == 0


def test_without_a_plant_the_product_is_right() -> None:
    guard = EpochGuard()
    guard.admit(2)
    with pytest.raises(StaleEpochError):
        guard.admit(1)


@pytest.mark.parametrize(
    ("place", "old", "part"),
    [
        (GUARD, "if epoch > self.newest", "0 times, not once"),
        (GUARD, "epoch", "times, not once"),
        ("kvstore.core.epoch:EpochGuard.gone", "x", "no function"),
        ("kvstore.core.epoch:EpochGuard", "x", "no function"),
    ],
)
def test_a_mutation_says_that_the_product_has_moved(place: str, old: str, part: str) -> None:
    with pytest.raises(LookupError, match=part):
        mutate(Mutation(place, old, "y"))


def test_an_unknown_bug_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(LookupError, match="take one of skip-fsync"):
        plant("skip")
    done = run("-m", "pytest", "tests/store/test_store_epoch.py", **{PLANTED: "skip"})
    assert done.returncode not in (0, 1), "tests ran as if the bug were planted"
    assert "take one of" in done.stderr + done.stdout


def test_a_daemon_runs_with_the_bug() -> None:
    done = run(
        "-m", "tests.faults.planted", "kvstore.node.daemon", "--help", **{PLANTED: "skip-fsync"}
    )
    assert done.returncode == 0, done.stderr
    assert "--ssd-dir" in done.stdout
