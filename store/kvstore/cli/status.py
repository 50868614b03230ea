"""``kvstore status``: the cluster on one screen."""

from typing import Any

from kvstore_proto import admin_pb2, common_pb2
from rich.console import Console

from kvstore.cli.connection import connect
from kvstore.cli.options import DEFAULT_MASTER, JsonOption, MasterOption
from kvstore.cli.output import (
    bar,
    console,
    count,
    duration,
    print_json,
    print_problems,
    short,
    size,
    table,
    tier_name,
    tier_text,
)
from kvstore.core.keys import DEFAULT_TENANT
from kvstore.node.settings import NodeConfig


def status(master: MasterOption = DEFAULT_MASTER, as_json: JsonOption = False) -> None:
    """Show the cluster: nodes, what is wrong with them, space of each tier, namespaces.

    [bold]Examples[/bold]
      [cyan]kvstore status[/cyan]
      [cyan]kvstore status --json | jq .nodes_ready[/cyan]
    """
    with connect(master) as admin:
        answer = admin.call("Status", admin_pb2.StatusRequest())
        namespaces = admin.namespaces()
    if as_json:
        print_json(status_json(answer, namespaces))
        return
    out = console()
    _print_summary(out, answer)
    print_problems(answer.problems)
    if answer.tiers:
        _print_tiers(out, list(answer.tiers))
    if any(policy != NodeConfig.ssd_admission for policy in answer.ssd_admissions):
        out.print(f"SSD admission: {', '.join(answer.ssd_admissions)}", markup=False)
    if namespaces:
        _print_namespaces(out, namespaces)


def usage_json(usage: common_pb2.TierUsage) -> dict[str, Any]:
    """One tier."""
    names = [f.name for f in usage.DESCRIPTOR.fields if f.name != "tier"]
    return {"tier": tier_name(usage.tier), **{name: getattr(usage, name) for name in names}}


def namespace_json(info: admin_pb2.NamespaceInfo) -> dict[str, Any]:
    """One namespace, with its whole spec."""
    spec = {f.name: getattr(info.spec, f.name) for f in info.spec.DESCRIPTOR.fields}
    return {"root": info.root.hex(), "tenant": info.tenant, "blocks": info.blocks, "spec": spec}


def status_json(
    answer: admin_pb2.StatusResponse, namespaces: list[admin_pb2.NamespaceInfo]
) -> dict[str, Any]:
    """The whole answer."""
    return {
        "version": answer.version,
        "cluster_epoch": answer.cluster_epoch,
        "leader": answer.leader,
        "uptime_s": answer.uptime_s,
        "nodes_ready": answer.nodes_ready,
        "nodes_lost": answer.nodes_lost,
        "indexed_blocks": answer.indexed_blocks,
        "index_bytes": answer.index_bytes,
        "problems": list(answer.problems),
        "ssd_admissions": list(answer.ssd_admissions),
        "tiers": [usage_json(usage) for usage in answer.tiers],
        "namespaces": [namespace_json(info) for info in namespaces],
    }


def _print_summary(out: Console, answer: admin_pb2.StatusResponse) -> None:
    lost = f", [red]{answer.nodes_lost} lost[/red]" if answer.nodes_lost else ""
    ready = "green" if answer.nodes_ready else "red"
    out.print(
        f"[bold]kvstore {answer.version}[/bold]  up {duration(answer.uptime_s)}, "
        f"epoch {answer.cluster_epoch}"
    )
    out.print(
        f"[{ready}]{count(answer.nodes_ready, 'node')} ready[/{ready}]{lost}; "
        f"{count(answer.indexed_blocks, 'block location')} indexed in {size(answer.index_bytes)}"
    )


def _print_tiers(out: Console, tiers: list[common_pb2.TierUsage]) -> None:
    # What is usually zero has a column only when it is not.
    passing = [
        name for name in ("pending", "quarantined") if any(_bytes(usage, name) for usage in tiers)
    ]
    numbers = ["live", *passing, "free"]
    rows = table("\nTiers", "tier", ">capacity", "used", *(f">{n}" for n in numbers), ">blocks")
    for usage in tiers:
        parts = [
            (usage.live_bytes, "green"),
            (usage.pending_bytes, "yellow"),
            (usage.quarantined_bytes, "red"),
        ]
        rows.add_row(
            tier_text(usage.tier),
            size(usage.capacity_bytes),
            bar(parts, usage.capacity_bytes),
            *(size(_bytes(usage, name)) for name in numbers),
            f"{usage.blocks:,}",
        )
    out.print(rows)


def _bytes(usage: common_pb2.TierUsage, name: str) -> int:
    return int(getattr(usage, f"{name}_bytes"))


def _print_namespaces(out: Console, namespaces: list[admin_pb2.NamespaceInfo]) -> None:
    tenants = any(info.tenant != DEFAULT_TENANT for info in namespaces)
    tenant = ["tenant"] if tenants else []
    rows = table("\nNamespaces", "root", "model", *tenant, "KV", ">a block", ">blocks")
    rows.columns[1].no_wrap = False
    for info in namespaces:
        rows.add_row(
            short(info.root),
            info.spec.model,
            *([info.tenant] if tenants else []),
            f"{info.spec.attention} {info.spec.kv_dtype}",
            f"{info.spec.block_tokens} tokens, {size(info.spec.block_bytes)}",
            f"{info.blocks:,}",
        )
    out.print(rows)
