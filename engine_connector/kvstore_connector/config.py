"""The connector's settings, as they come in an engine's ``--kv-transfer-config``."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from kvstore.config import parse_size
from kvstore.errors import ConfigError

UNIX_PATH_BYTES_MAX = 107
Role = Literal["kv_both", "kv_producer", "kv_consumer"]
ROLES = ("kv_both", "kv_producer", "kv_consumer")
KNOWN_KEYS = frozenset(
    {
        "kv_connector",
        "kv_connector_module_path",
        "kv_role",
        "kv_connector_extra_config",
        "kv_load_failure_policy",
        "engine_id",
    }
)
_SIZES = frozenset({"load_bytes_per_s_min", "save_queue_bytes", "save_batch_bytes"})


@dataclass(frozen=True, slots=True)
class ConnectorConfig:
    """What the connector may use and how long it may wait."""

    node: str  # address of this host's node: unix:PATH or HOST:PORT
    role: Role = "kv_both"  # producer: only saves; consumer: only loads
    tenant: str = "default"
    connect_timeout_s: float = 2.0  # at start, and for every attempt afterwards
    load_timeout_s: float = 2.0  # a load's deadline: this, and its bytes at the slowest useful pace
    load_bytes_per_s_min: int = 256 << 20  # slower than this, recomputing is as good
    min_load_blocks: int = 1  # fewer than this are not worth a load
    save_timeout_s: float = 5.0  # for one batch, waiting for space included
    save_queue_bytes: int = 256 << 20  # pages that wait to be saved; beyond it saves are dropped
    save_batch_bytes: int = 128 << 20  # of the chains that are saved side by side
    save_linger_s: float = 2.0  # while requests run, blocks wait so long for others of a batch

    def __post_init__(self) -> None:
        if not self.node:
            raise ConfigError('kv_connector_extra_config.node is not set, like "unix:/…/node.sock"')
        _check_address(self.node)
        for name in ("connect_timeout_s", "load_timeout_s", "save_timeout_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise ConfigError(f"{name} is {getattr(self, name)}; take more than 0, up to 3600")
        if not 0 <= self.save_linger_s <= 60:
            raise ConfigError(f"save_linger_s is {self.save_linger_s}; take 0 to 60")
        for name in ("min_load_blocks", "load_bytes_per_s_min", "save_batch_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; take 1 or more")

    @property
    def loads(self) -> bool:
        """Whether this engine reads from the store."""
        return self.role != "kv_producer"

    @property
    def saves(self) -> bool:
        """Whether this engine writes to the store."""
        return self.role != "kv_consumer"

    def load_seconds(self, nbytes: int) -> float:
        """Seconds that a load of ``nbytes`` may take before it ends as it is."""
        return self.load_timeout_s + nbytes / self.load_bytes_per_s_min


def _check_address(node: str) -> None:
    """ConfigError for what can never be an address, whether or not a node is there."""
    if node.startswith("unix:"):
        path = os.fsencode(node.removeprefix("unix:"))
        if len(path) > UNIX_PATH_BYTES_MAX:
            raise ConfigError(
                f"kv_connector_extra_config.node: the socket's path has {len(path)} bytes; the "
                f"most is {UNIX_PATH_BYTES_MAX}"
            )
        right = bool(path) and b"\0" not in path
    else:
        host, _, port = node.rpartition(":")
        right = bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16
    if not right:
        raise ConfigError(
            f"kv_connector_extra_config.node is {node!r}; write it like "
            "unix:/run/kvstore/node.sock or HOST:PORT"
        )


def _typed(name: str, kind: type, value: object) -> object:
    if name in _SIZES and isinstance(value, int | str):
        return parse_size(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(
        f"kv_connector_extra_config.{name} is {value!r}; take a value of type {kind.__name__}"
    )


def _extra(table: object) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise ConfigError("kv_connector_extra_config must be an object")
    kinds = {f.name: type(f.default) for f in fields(ConnectorConfig) if f.name != "role"}
    kinds["node"] = str
    if unknown := sorted(set(table) - set(kinds)):
        raise ConfigError(
            f"kv_connector_extra_config: unknown key {unknown[0]!r}; known are "
            + ", ".join(sorted(kinds))
        )
    return {name: _typed(name, kinds[name], value) for name, value in table.items()}


def parse_transfer_config(table: Mapping[str, Any]) -> ConnectorConfig:
    """The settings in a ``kv-transfer-config``; ConfigError names what is wrong in it."""
    if unknown := sorted(set(table) - KNOWN_KEYS):
        raise ConfigError(
            f"kv_transfer_config: unknown key {unknown[0]!r}; known are "
            + ", ".join(sorted(KNOWN_KEYS))
        )
    role = table.get("kv_role", "kv_both")
    if role not in ROLES:
        raise ConfigError(f"kv_role is {role!r}; take one of {', '.join(ROLES)}")
    policy = table.get("kv_load_failure_policy", "recompute")
    if policy != "recompute":
        raise ConfigError(f"kv_load_failure_policy is {policy!r}; this connector only recomputes")
    values = {"node": "", **_extra(table.get("kv_connector_extra_config", {}))}
    return ConnectorConfig(role=cast("Role", role), **values)
