"""``kvstore nodes``: every node that the master knows."""

from typing import Any

from kvstore_proto import admin_pb2, common_pb2
from rich.text import Text

from kvstore.cli.connection import connect
from kvstore.cli.options import DEFAULT_MASTER, JsonOption, MasterOption
from kvstore.cli.output import (
    console,
    duration,
    print_json,
    print_problems,
    size,
    table,
    tier_name,
)
from kvstore.cli.status import usage_json

STATE_STYLES = {"ready": "green", "syncing": "yellow", "lost": "red"}
JUST_NOW_MS = 10_000


def nodes(master: MasterOption = DEFAULT_MASTER, as_json: JsonOption = False) -> None:
    """List the nodes, those that are lost included.

    A node is [green]ready[/green], [yellow]syncing[/yellow] while its inventory is on the way,
    or [red]lost[/red]: its blocks cannot be found until it comes back. Below the table stands
    what is wrong with a node that goes on, such as an SSD that takes no more writes.

    [bold]Examples[/bold]
      [cyan]kvstore nodes[/cyan]
      [cyan]kvstore nodes --json | jq '.nodes[] | select(.state == "lost") | .node_id'[/cyan]
      [cyan]kvstore nodes --json | jq '.nodes[] | select(.problems != []) | .problems'[/cyan]
    """
    with connect(master) as admin:
        found = list(admin.call("ListNodes", admin_pb2.ListNodesRequest()).nodes)
    if as_json:
        print_json({"nodes": [node_json(node) for node in found]})
        return
    if not found:
        console().print("No node has joined this master yet.")
        return
    rows = table("", "node", "state", ">seen", ">DRAM", ">SSD", "where")
    rows.columns[-1].no_wrap = False
    for node in found:
        tiers = {tier_name(usage.tier): usage for usage in node.tiers}
        rows.add_row(
            node.node_id,
            Text(node.state, style=STATE_STYLES.get(node.state, "")),
            _seen(node.last_seen_ms),
            _used(tiers.get("DRAM")),
            _used(tiers.get("SSD")),
            f"{node.hostname} {node.address}",
        )
    console().print(rows)
    print_problems([f"{node.node_id}: {text}" for node in found for text in node.problems])


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
    }


def _seen(last_seen_ms: int) -> str:
    return "now" if last_seen_ms < JUST_NOW_MS else f"{duration(last_seen_ms / 1000)} ago"


def _used(usage: common_pb2.TierUsage | None) -> Text:
    if usage is None or not usage.capacity_bytes:
        return Text("–", style="bright_black")
    used = usage.capacity_bytes - usage.free_bytes
    return Text(f"{100 * used / usage.capacity_bytes:.0f} % of {size(usage.capacity_bytes)}")
