"""I1: keys that share a long part are different keys, in the node and in its directory."""

import pytest
from kvstore.core.types import EndReason, ReserveStatus

from tests.store.rig import Rig, chain

KEY = chain("near", 1)[0]
OTHER = chain("far", 1)[0]
NEAR = {
    "first-8": KEY[:8] + OTHER[8:],
    "first-31": KEY[:31] + bytes([KEY[31] ^ 1]),
    "last-31": bytes([KEY[0] ^ 1]) + KEY[1:],
    "all-but-one-bit-of-the-middle": KEY[:16] + bytes([KEY[16] ^ 0x80]) + KEY[17:],
}


@pytest.mark.parametrize("near", NEAR.values(), ids=NEAR)
def test_I1_a_near_key_is_another_block(tiers: Rig, near: bytes) -> None:
    tiers.put([KEY])
    assert not len(tiers.directory.match(near))
    assert tiers.get([near]) == (0, EndReason.NEVER_STORED)
    assert tiers.put([near]) == bytes([ReserveStatus.SLOT])
    for key in (KEY, near):
        assert tiers.get([key]) == (1, EndReason.COMPLETE)
    tiers.settle()


def test_I1_near_keys_stay_apart_over_a_restart() -> None:
    rig = Rig(8, 32)
    rig.open()
    for key in (KEY, *NEAR.values()):
        rig.put([key])
    rig.settle()
    rig = Rig(8, 32, disk=rig.disk)
    rig.open()
    for key in (KEY, *NEAR.values()):
        assert rig.get([key]) == (1, EndReason.COMPLETE)
    rig.check()
