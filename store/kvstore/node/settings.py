"""What a node is told at its start."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from kvstore.config import check_path, check_socket_path, option, readable_size
from kvstore.core.admission import check_admission
from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.errors import ConfigError

WRITE_CHECKS = ("adaptive", "all")
_ADDRESS = re.compile(r"unix:.+|.+:\d+")
_NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def default_data_dir() -> Path:
    """Where a node keeps its state if it is not told."""
    return Path.home() / ".local" / "share" / "kvstore" / "node"


@dataclass(frozen=True)
class NodeConfig:
    """Settings of kvstore-node; the same names in TOML, as KVSTORE_NODE_NAME, and as flags."""

    data_dir: Path = option(  # noqa: RUF009
        default_data_dir(), text="directory of this node alone: its id, its socket, its SSD tier"
    )
    node_id: str = option("", text="stable name; empty: a random one, kept in data_dir")
    listen: str = option("", text="unix:PATH or HOST:PORT; empty: unix:DATA_DIR/node.sock")
    pool_dir: Path = option(  # noqa: RUF009
        Path("/dev/shm"), text="file system in memory for the DRAM tier"
    )
    dram: int = option(1 << 30, text="size of the DRAM tier, like 8GiB", size=True)
    ssd: int = option(0, text="size of the SSD tier, like 64GiB; 0: none", size=True)
    ssd_dir: str = option("", text="directory of the SSD tier; empty: DATA_DIR/ssd")
    ssd_admission: str = option(
        "always",
        text="which blocks are written to SSD: always, second-use (once used again), or reuse "
        "(while there is room; then what is used more than what it displaces)",
    )
    ssd_write_checks: str = option(
        "adaptive",
        text="which blocks are verified before they are written to SSD: adaptive (one of 16 while "
        "writes queue up, until a block was corrupt; else all), or all",
    )
    scrub_mb_s: float = option(
        8.0, text="how fast SSD blocks are verified in the background, in MB/s; 0: not at all"
    )
    master: str = option("", text="HOST:PORT of the master; empty: work alone")
    metrics_listen: str = option("127.0.0.1:9401", text="HOST:PORT for Prometheus; empty: none")
    quarantine_s: float = option(
        30.0, text="how long slots rest whose client was lost and cannot be seen, in seconds"
    )
    sessions_max: int = option(1024, text="client sessions at a time")
    insecure: bool = option(False, text="allow an address that others on the network reach")
    log_level: str = option("info", text="debug, info, warning or error")

    def __post_init__(self) -> None:
        if self.node_id and not _NODE_ID.fullmatch(self.node_id):
            raise ConfigError(f"node_id {self.node_id!r}; take 1 to 128 letters, digits and ._:-")
        if self.listen and not _ADDRESS.fullmatch(self.listen):
            raise ConfigError(f"listen {self.listen!r}; write it like unix:/run/kvstore/node.sock")
        check_socket_path(self.address, "listen")
        if self.ssd_dir:
            check_path(self.ssd_dir, "ssd_dir")
        if self.dram < SLOT_ALIGN_BYTES:
            raise ConfigError(f"dram is {readable_size(self.dram)}; a DRAM tier has at least 4KiB")
        if 0 < self.ssd < SLOT_ALIGN_BYTES:
            raise ConfigError(f"ssd is {readable_size(self.ssd)}; take 0 or at least 4KiB")
        if not 0 <= self.quarantine_s < math.inf:
            raise ConfigError(f"quarantine_s is {self.quarantine_s}; take 0 or more")
        check_admission(self.ssd_admission)
        if self.ssd_write_checks not in WRITE_CHECKS:
            raise ConfigError(
                f"ssd_write_checks {self.ssd_write_checks!r}; take one of {', '.join(WRITE_CHECKS)}"
            )
        if not 0 <= self.scrub_mb_s < float("inf"):
            raise ConfigError(f"scrub_mb_s is {self.scrub_mb_s}; take 0 or more")
        if self.sessions_max < 1:
            raise ConfigError(f"sessions_max is {self.sessions_max}; take 1 or more")

    @property
    def address(self) -> str:
        """Where the Node service is to listen."""
        return self.listen or f"unix:{self.data_dir.absolute()}/node.sock"

    @property
    def ssd_path(self) -> Path:
        """Directory of the SSD tier."""
        return Path(self.ssd_dir) if self.ssd_dir else self.data_dir / "ssd"
