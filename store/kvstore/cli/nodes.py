"""``kvstore nodes``: every node that the master knows."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from kvstore_proto import admin_pb2, common_pb2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstore.cli.connection import connect
from kvstore.cli.options import DEFAULT_MASTER, JsonOption, MasterOption, not_empty
from kvstore.cli.output import (
    Fit,
    console,
    cut,
    duration,
    print_fitting,
    print_json,
    print_problems,
    size,
    table,
    tier_name,
    widest_of,
)
from kvstore.cli.status import usage_json

LOST = "lost"
STATE_STYLES = {"ready": "green", "syncing": "yellow", LOST: "red"}
JUST_NOW_MS = 10_000


def nodes(
    forget: Annotated[
        str,
        typer.Option(
            metavar="ID",
            callback=not_empty,
            help="Take this lost node off the list, for good.",
        ),
    ] = "",
    master: MasterOption = DEFAULT_MASTER,
    as_json: JsonOption = False,
) -> None:
    """List the nodes, those that are lost included, or forget one that will not come back.

    A node is [green]ready[/green], [yellow]syncing[/yellow] while its inventory is on the way,
    or [red]lost[/red]: its blocks cannot be found until it comes back. Below the table stands
    what is wrong with a node that goes on, such as an SSD that takes no more writes.

    [bold]Examples[/bold]
      [cyan]kvstore nodes[/cyan]
      [cyan]kvstore nodes --json | jq '.nodes[] | select(.state == "lost") | .node_id'[/cyan]
      [cyan]kvstore nodes --json | jq '.nodes[] | select(.problems != []) | .problems'[/cyan]
      [cyan]kvstore nodes --forget node-1a2b3c4d5e6f[/cyan]
    """
    with connect(master) as admin:
        if forget:
            admin.call("ForgetNode", admin_pb2.ForgetNodeRequest(node_id=forget))
            if not as_json:
                console().print(f"Forgot {forget}.", markup=False)
                return
        found = list(admin.call("ListNodes", admin_pb2.ListNodesRequest()).nodes)
    if as_json:
        print_json({"nodes": [node_json(node) for node in found]})
        return
    if not found:
        console().print("No node has joined this master yet.")
        return
    _print(console(), found)
    print_problems([f"{node.node_id}: {text}" for node in found for text in node.problems])


def _print(out: Console, found: Sequence[admin_pb2.NodeInfo]) -> None:
    ids = widest_of(node.node_id for node in found)
    shown = print_fitting(
        out,
        Fit(lambda cells: _rows(found, cells, where=True), ids, ids),
        Fit(lambda cells: _rows(found, cells), ids, ids),
        Fit(lambda cells: _rows(found, cells, shares=True), ids),
    )
    if shown.columns[-1].header != "where":  # ids and addresses are of use only as a whole
        for node in found:
            out.print(Text(f"{node.node_id}  {_where(node)}"), soft_wrap=True)


def _rows(
    found: Sequence[admin_pb2.NodeInfo], id_cells: int, *, where: bool = False, shares: bool = False
) -> Table:
    rows = table("", "node", "state", ">seen", ">DRAM", ">SSD", *(["where"] if where else []))
    for node in found:
        tiers = {tier_name(usage.tier): usage for usage in node.tiers}
        rows.add_row(
            cut(node.node_id, id_cells),
            Text(node.state, style=STATE_STYLES.get(node.state, "")),
            _seen(node),
            _used(tiers.get("DRAM"), share=shares),
            _used(tiers.get("SSD"), share=shares),
            *([_where(node)] if where else []),
        )
    return rows


def _where(node: admin_pb2.NodeInfo) -> str:
    return f"{node.hostname} {node.address}"


def node_json(node: admin_pb2.NodeInfo) -> dict[str, Any]:
    """One node."""
    return {
        "node_id": node.node_id,
        "state": node.state,
        "hostname": node.hostname,
        "address": node.address,
        "version": node.version,
        "last_seen_ms": node.last_seen_ms,
        "sessions": node.sessions,
        "tiers": [usage_json(usage) for usage in node.tiers],
        "problems": list(node.problems),
        "ssd_admission": node.ssd_admission,
    }


def _seen(node: admin_pb2.NodeInfo) -> str:
    if node.state != LOST and node.last_seen_ms < JUST_NOW_MS:
        return "now"
    return f"{duration(node.last_seen_ms / 1000)} ago"


def _used(usage: common_pb2.TierUsage | None, *, share: bool) -> Text:
    if usage is None or not usage.capacity_bytes:
        return Text("–", style="bright_black")
    used = usage.capacity_bytes - usage.free_bytes
    text = f"{100 * used / usage.capacity_bytes:.0f} %"
    return Text(text if share else f"{text} of {size(usage.capacity_bytes)}")
