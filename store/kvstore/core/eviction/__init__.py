"""Eviction policies behind one interface."""

from kvstore.core.eviction.base import EvictionPolicy, RankWindow
from kvstore.core.eviction.lru import LruPolicy
from kvstore.core.eviction.s3fifo import S3FifoPolicy
from kvstore.core.table import Table
from kvstore.core.types import Tier
from kvstore.errors import ConfigError

POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LruPolicy, "s3fifo": S3FifoPolicy}

__all__ = ["POLICIES", "EvictionPolicy", "LruPolicy", "RankWindow", "S3FifoPolicy", "make_policy"]


def make_policy(name: str, table: Table, tier: Tier) -> EvictionPolicy:
    """The policy of that name for one tier."""
    if name not in POLICIES:
        raise ConfigError(f"eviction policy {name!r}; take one of {sorted(POLICIES)}")
    return POLICIES[name](table, tier)
