"""Small translations between messages and the index, shared by the services."""

from collections.abc import Iterable
from dataclasses import fields

from kvstore_proto import common_pb2, master_pb2

from kvstore.core.keys import KEY_BYTES
from kvstore.core.locations import Run
from kvstore.core.spec import CacheSpec
from kvstore.core.types import EndReason, Tier
from kvstore.errors import InvalidArgumentError

U64_MAX = (1 << 64) - 1
TENANT_BYTES_MAX = 1024
REAL_TIERS = (Tier.HBM, Tier.DRAM, Tier.SSD)


def check_root(root: bytes) -> None:
    """Raises InvalidArgumentError unless ``root`` is one namespace's."""
    if len(root) != KEY_BYTES:
        raise InvalidArgumentError(f"a namespace root has {KEY_BYTES} bytes, not {len(root)}")


def check_namespace(report: master_pb2.NamespaceReport) -> None:
    """Raises InvalidArgumentError where no client can have opened such a namespace."""
    if len(report.tenant.encode()) > TENANT_BYTES_MAX:
        raise InvalidArgumentError(
            f"the name of its tenant has {len(report.tenant.encode())} bytes; take at most "
            f"{TENANT_BYTES_MAX}"
        )
    if report.HasField("spec"):
        CacheSpec(**{field.name: getattr(report.spec, field.name) for field in fields(CacheSpec)})


def real_tiers(tiers: Iterable[common_pb2.TierUsage]) -> list[common_pb2.TierUsage]:
    """The usage of each tier that there is, once."""
    found: dict[int, common_pb2.TierUsage] = {}
    for usage in tiers:
        if int(usage.tier) in REAL_TIERS:
            found.setdefault(int(usage.tier), usage)
    return list(found.values())


def clamped(number: int) -> int:
    """``number`` as a field of 64 bits can have it."""
    return min(number, U64_MAX)


def tier_value(tier: Tier) -> common_pb2.Tier.ValueType:
    """The protocol's number of a tier."""
    return common_pb2.Tier.ValueType(tier.value)


def end_value(reason: EndReason) -> common_pb2.EndReason.ValueType:
    """The protocol's number of an end reason."""
    return common_pb2.EndReason.ValueType(reason.value)


def run_message(run: Run) -> common_pb2.LocatedRun:
    """The message of one run."""
    return common_pb2.LocatedRun(
        first=run.first,
        count=run.count,
        node_id=run.place.node_id,
        tier=tier_value(run.place.tier),
        engine_id=run.place.engine_id,
    )
