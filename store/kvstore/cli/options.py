"""Options that several commands share, and how their values are read."""

from enum import StrEnum
from typing import Annotated

import typer
from kvstore_proto import common_pb2

from kvstore.config import UNIX, check_socket_path, parse_size, split_host_port
from kvstore.core.keys import KEY_BYTES
from kvstore.errors import ConfigError

DEFAULT_MASTER = "127.0.0.1:9400"


class TierName(StrEnum):
    """A tier, as it is typed."""

    HBM = "hbm"
    DRAM = "dram"
    SSD = "ssd"


class OwnTierName(StrEnum):
    """A tier that a node owns, and can evict from."""

    DRAM = "dram"
    SSD = "ssd"


def tier_number(tier: TierName | OwnTierName | None) -> common_pb2.Tier.ValueType:
    """The protocol's number; 0 for none."""
    return common_pb2.Tier.Value(f"TIER_{tier.name}" if tier else "TIER_UNSPECIFIED")


def _check_size(value: str) -> str:
    try:
        parse_size(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return value


def not_empty(context: typer.Context, option: typer.CallbackParam, value: str) -> str:
    """A callback: an option may be left out, but an unset variable must not mean "all"."""
    source = context.get_parameter_source(str(option.name))
    if not value.strip() and source is not None and source.name != "DEFAULT":
        raise typer.BadParameter(f"it is empty; leave {option.opts[0]} out, or give it a value")
    return value


def _check_address(context: typer.Context, option: typer.CallbackParam, value: str) -> str:
    """A callback: where a master can be."""
    not_empty(context, option, value)
    try:
        check_socket_path(value, "address")
        if not value.startswith(UNIX):
            split_host_port(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    return value


def read_keys(value: str) -> bytes:
    """Keys as comma-separated hex digits, joined as they travel; none for ``""`` alone."""
    try:
        keys = [bytes.fromhex(part.strip()) for part in value.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"{value!r}: keys are hex digits") from None
    if value and not keys:
        raise typer.BadParameter(f"{value!r} has no key; `blocks --json` has them")
    if any(len(key) != KEY_BYTES for key in keys):
        raise typer.BadParameter(f"a key has {2 * KEY_BYTES} hex digits; `blocks --json` has them")
    return b"".join(keys)


MasterOption = Annotated[
    str,
    typer.Option(
        "--master",
        envvar="KVSTORE_MASTER",
        metavar="HOST:PORT",
        callback=_check_address,
        help="Address of the master, or unix:PATH.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
NodeOption = Annotated[
    str,
    typer.Option(
        "--node",
        metavar="ID",
        callback=not_empty,
        help="Only this node; `kvstore nodes` lists them.",
    ),
]
NamespaceOption = Annotated[
    str,
    typer.Option(
        "--namespace",
        metavar="HEX",
        callback=not_empty,
        help="First digits of a namespace's root; `kvstore status` lists them.",
    ),
]


def size_option(flag: str, text: str) -> typer.models.OptionInfo:
    """An option for a size such as 1GiB."""
    option: typer.models.OptionInfo = typer.Option(
        flag, metavar="SIZE", help=text, callback=_check_size
    )
    return option
