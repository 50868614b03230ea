"""Client of a kvstore node: asyncio, with a thin blocking facade."""

from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, Tier

from kvstore_client.blocking import Client
from kvstore_client.bulk import Got, Put
from kvstore_client.client import AsyncClient, connect
from kvstore_client.lease import Lease
from kvstore_client.namespace import Match, Namespace
from kvstore_client.reading import Read
from kvstore_client.writing import Shard, Write

__all__ = [
    "AckLevel",
    "AsyncClient",
    "CacheSpec",
    "Client",
    "EndReason",
    "Got",
    "Lease",
    "Match",
    "Namespace",
    "Put",
    "Read",
    "ReserveStatus",
    "Shard",
    "Tier",
    "Write",
    "connect",
]
