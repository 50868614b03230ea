"""``kvstore evict`` and ``kvstore purge``: blocks that are to go."""

import sys
from typing import Annotated, Any

import typer
from kvstore_proto import admin_pb2

from kvstore.cli.connection import Admin, connect
from kvstore.cli.options import (
    DEFAULT_MASTER,
    JsonOption,
    MasterOption,
    NamespaceOption,
    NodeOption,
    OwnTierName,
    not_empty,
    read_keys,
    size_option,
    tier_number,
)
from kvstore.cli.output import console, count, print_json, short, size
from kvstore.config import parse_size

REMOVAL_TIMEOUT_S = 300.0
STAY = {
    OwnTierName.DRAM: " Blocks that are not on SSD yet stay until they are; --drop evicts them.",
    OwnTierName.SSD: " Blocks without another copy stay; --drop evicts them.",
}


def evict(
    tier: Annotated[OwnTierName, typer.Option(help="Tier to evict from.", case_sensitive=False)],
    node: NodeOption = "",
    limit: Annotated[str, size_option("--bytes", "Stop after this many bytes; 0: all.")] = "0",
    keys: Annotated[
        str,
        typer.Option(
            metavar="HEX,…",
            callback=not_empty,
            help="Only these blocks; `blocks --json` has keys.",
        ),
    ] = "",
    drop: Annotated[
        bool, typer.Option("--drop", help="Also drop blocks that have no other copy.")
    ] = False,
    master: MasterOption = DEFAULT_MASTER,
    as_json: JsonOption = False,
) -> None:
    """Evict blocks from a tier, the ends of chains first.

    Blocks that a client is reading stay. Unless you pass --drop, so do those
    that the node has in no other tier; without --bytes, those in DRAM leave
    it as soon as they are on SSD.

    [bold]Examples[/bold]
      [cyan]kvstore evict --tier dram[/cyan]
      [cyan]kvstore evict --tier ssd --bytes 10GiB --drop --node node-1[/cyan]
    """
    request = admin_pb2.EvictRequest(
        node_id=node,
        tier=tier_number(tier),
        keys=read_keys(keys),
        bytes=parse_size(limit),
        drop=drop,
    )
    with connect(master) as admin:
        answer = admin.call("Evict", request, REMOVAL_TIMEOUT_S)
    nothing = not (drop or answer.blocks or answer.pinned or answer.errors)
    _report("Evicted", answer, as_json=as_json, hint=STAY[tier] if nothing else "")


def purge(
    namespace: NamespaceOption = "",
    everything: Annotated[bool, typer.Option("--all", help="All namespaces.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    master: MasterOption = DEFAULT_MASTER,
    as_json: JsonOption = False,
) -> None:
    """Forget every block of a namespace, in every tier of every node.

    [bold]Examples[/bold]
      [cyan]kvstore purge --namespace 3fa9c1[/cyan]
      [cyan]kvstore purge --all --yes[/cyan]
    """
    if bool(namespace) == everything:
        raise typer.BadParameter("name one --namespace, or pass --all")
    with connect(master) as admin:
        request = admin_pb2.PurgeRequest(root=admin.root(namespace), all=everything)
        if not yes:
            _confirm(admin, request.root)
        answer = admin.call("Purge", request, REMOVAL_TIMEOUT_S)
    _report("Purged", answer, as_json=as_json)


def _confirm(admin: Admin, root: bytes) -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise typer.BadParameter("pass --yes; there is no terminal to ask on")
    meant = [info for info in admin.namespaces() if root in (b"", info.root)]
    for info in meant:
        name = f"{short(info.root)} ({info.spec.model})"
        console(stderr=True).print(f"  {name}: {count(info.blocks, 'block')}")
    typer.confirm("Forget them in every tier?", abort=True, err=True)


def removal_json(answer: admin_pb2.RemovalResponse) -> dict[str, Any]:
    """What was removed, and what went wrong."""
    return {
        "blocks": answer.blocks,
        "bytes": answer.bytes,
        "pinned": answer.pinned,
        "nodes": answer.nodes,
        "errors": list(answer.errors),
    }


def _report(verb: str, answer: admin_pb2.RemovalResponse, *, as_json: bool, hint: str = "") -> None:
    """Prints the outcome; exits with 1 where a node could not do its part."""
    if as_json:
        print_json(removal_json(answer))
    else:
        pinned = f" {count(answer.pinned, 'block')} in use stayed." if answer.pinned else ""
        console().print(
            f"{verb} {count(answer.blocks, 'block')} ({size(answer.bytes)}) on "
            f"{count(answer.nodes, 'node')}.{pinned}{hint}"
        )
        for error in answer.errors:
            console(stderr=True).print(error, style="red", markup=False, soft_wrap=True)
    if answer.errors:
        raise typer.Exit(1)
