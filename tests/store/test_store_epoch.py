"""I5: the cluster epoch never goes back."""

import pytest
from kvstore.core.epoch import EpochGuard
from kvstore.errors import StaleEpochError


def test_I5_only_the_newest_epoch_is_obeyed() -> None:
    guard = EpochGuard()
    for epoch in (0, 3, 3, 7):
        guard.admit(epoch)
    for epoch in (0, 6):
        with pytest.raises(StaleEpochError, match=f"{epoch} is older than 7"):
            guard.admit(epoch)
    guard.admit(7)
    assert (guard.newest, guard.refused) == (7, 2)
