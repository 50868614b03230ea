"""Configuration of kvstore-master."""

from dataclasses import dataclass
from pathlib import Path

from kvstore.config import check_socket_path, option
from kvstore.errors import ConfigError

HEARTBEAT_MS_MIN = 20
HEARTBEATS_UNTIL_LOST = 2


def default_data_dir() -> Path:
    """Where a master keeps its state if it is not told."""
    return Path.home() / ".local" / "share" / "kvstore" / "master"


@dataclass(frozen=True)
class MasterConfig:
    """Settings of a master; each is a key of its TOML file, a flag and KVSTORE_MASTER_NAME."""

    listen: str = option("127.0.0.1:9400", text="HOST:PORT or unix:PATH to serve on")
    data_dir: Path = option(  # noqa: RUF009
        default_data_dir(), text="directory of the durable cluster state"
    )
    metrics_listen: str = option("127.0.0.1:9402", text="HOST:PORT for Prometheus; empty: none")
    heartbeat_ms: int = option(
        1000, text="milliseconds between the reports of a node; after two without, it is lost"
    )
    index_keys_max: int = option(50_000_000, text="blocks to index at most, about 150 bytes each")
    insecure: bool = option(False, text="allow addresses that others on the network reach")
    log_level: str = option("info", text="debug, info, warning or error")

    def __post_init__(self) -> None:
        check_socket_path(self.listen, "listen")
        if self.heartbeat_ms < HEARTBEAT_MS_MIN:
            raise ConfigError(
                f"heartbeat_ms is {self.heartbeat_ms}; take {HEARTBEAT_MS_MIN} or more"
            )
        if self.index_keys_max < 1:
            raise ConfigError(f"index_keys_max is {self.index_keys_max}; take 1 or more")

    @property
    def lost_after_s(self) -> float:
        """Seconds without a report after which a node counts as lost."""
        return HEARTBEATS_UNTIL_LOST * self.heartbeat_ms / 1000
