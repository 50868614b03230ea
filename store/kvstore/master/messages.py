"""Small translations between messages and the index, shared by the services."""

from kvstore_proto import common_pb2

from kvstore.core.keys import KEY_BYTES
from kvstore.core.locations import Run
from kvstore.core.types import EndReason, Tier
from kvstore.errors import InvalidArgumentError


def check_root(root: bytes) -> None:
    """Raises InvalidArgumentError unless ``root`` is one namespace's."""
    if len(root) != KEY_BYTES:
        raise InvalidArgumentError(f"a namespace root has {KEY_BYTES} bytes, not {len(root)}")


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
