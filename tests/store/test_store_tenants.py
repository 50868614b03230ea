"""I10: tenants of one node, each with a secret of its own."""

import numpy as np
import pytest
from kvstore.core.directory import DirectoryWriter
from kvstore.core.keys import block_keys
from kvstore.core.node_core import NodeCore
from kvstore.core.spec import CacheSpec
from kvstore.core.types import CoreConfig, EndReason, ReserveStatus
from kvstore.errors import InvalidArgumentError

from tests.store.rig import BLOCK, FakeDisk, Rig

SECRETS = {"red": b"secret of red", "blue": b"secret of blue"}
TOKENS = np.arange(4 * 64)


def with_tenants(disk: FakeDisk | None = None) -> Rig:
    """A rig whose node knows two tenants; session 1 is open."""
    rig = Rig(16, 32, disk=disk, tenants=SECRETS)
    rig.open()
    return rig


def be(rig: Rig, tenant: str) -> list[bytes]:
    """From now on the rig speaks for a tenant; its keys of the one prompt."""
    namespace = rig.core.open_namespace(rig.spec, tenant)
    assert namespace.tenant == tenant
    rig.ns = namespace.id
    return block_keys(namespace.root, TOKENS, rig.spec.block_tokens)


def test_I10_tenants_with_one_prompt_share_nothing() -> None:
    rig = with_tenants()
    red = be(rig, "red")
    assert rig.put(red) == bytes([ReserveStatus.SLOT] * 4)
    blue = be(rig, "blue")
    assert not set(red) & set(blue)
    assert rig.get(blue) == (0, EndReason.NEVER_STORED)
    assert rig.put(blue) == bytes([ReserveStatus.SLOT] * 4), "blue noticed what red has stored"
    be(rig, "red")
    assert rig.get(red) == (4, EndReason.COMPLETE)
    rig.settle()
    rig.check()


def test_I10_keys_of_another_tenant_read_nothing() -> None:
    rig = with_tenants()
    red = be(rig, "red")
    rig.put(red)
    be(rig, "blue")
    assert rig.get(red)[0] == 0
    assert not rig.core.match(1, rig.next_id(), rig.ns, b"".join(red)).replies[0].body.tiers  # type: ignore[union-attr]
    rig.settle()
    rig.check()


def test_I10_tenants_stay_apart_over_a_restart() -> None:
    rig = with_tenants()
    red = be(rig, "red")
    rig.put(red)
    rig.settle()
    rig = with_tenants(rig.disk)
    blue = be(rig, "blue")
    assert rig.get(blue) == (0, EndReason.NEVER_STORED)
    assert be(rig, "red") == red
    assert rig.get(red) == (4, EndReason.COMPLETE)


def test_I10_unknown_tenant_is_refused_and_no_other_is_named() -> None:
    core = NodeCore(
        CoreConfig(dram_bytes=16 * BLOCK),
        DirectoryWriter(
            bytearray(DirectoryWriter.size_bytes(1024, 16 * BLOCK)),
            entries=1024,
            pool_bytes=16 * BLOCK,
            instance=1,
        ),
        SECRETS,
    )
    for tenant in ("green", "", "default"):
        with pytest.raises(InvalidArgumentError, match="not known here") as refused:
            core.open_namespace(CacheSpec.raw("x", block_bytes=BLOCK), tenant)
        assert "red" not in str(refused.value)
