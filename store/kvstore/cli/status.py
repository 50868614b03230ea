"""``kvstore status``: the cluster on one screen."""

from collections.abc import Sequence
from typing import Any

from kvstore_proto import admin_pb2, common_pb2
from rich.console import Console
from rich.table import Table

from kvstore.cli.connection import connect
from kvstore.cli.options import DEFAULT_MASTER, JsonOption, MasterOption
from kvstore.cli.output import (
    BAR_CELLS,
    Fit,
    bar,
    console,
    count,
    cut,
    duration,
    print_fitting,
    print_json,
    print_problems,
    short,
    size,
    table,
    tier_name,
    tier_text,
    widest_of,
)
from kvstore.core.keys import DEFAULT_TENANT
from kvstore.node.settings import NodeConfig

BAR_CELLS_LEAST = 6
MODEL_CELLS_LEAST = 16


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
    _print_summary(out, answer, sum(info.blocks for info in namespaces))
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


def _print_summary(out: Console, answer: admin_pb2.StatusResponse, blocks: int) -> None:
    lost = f", [red]{answer.nodes_lost} lost[/red]" if answer.nodes_lost else ""
    ready = "green" if answer.nodes_ready else "red"
    out.print(
        f"[bold]kvstore {answer.version}[/bold]  up {duration(answer.uptime_s)}, "
        f"epoch {answer.cluster_epoch}"
    )
    out.print(
        f"[{ready}]{count(answer.nodes_ready, 'node')} ready[/{ready}]{lost}; "
        f"{count(blocks, 'block')} indexed (copies in all tiers: {answer.indexed_blocks:,})"
    )


def _print_tiers(out: Console, tiers: list[common_pb2.TierUsage]) -> None:
    # What is usually zero has a column only when it is not.
    passing = [
        name for name in ("pending", "quarantined") if any(_bytes(usage, name) for usage in tiers)
    ]
    numbers = ["live", *passing, "free"]
    print_fitting(
        out,
        Fit(lambda cells: _tier_rows(tiers, cells, numbers), BAR_CELLS, BAR_CELLS_LEAST),
        Fit(lambda _: _tier_rows(tiers, 0, numbers), 0, 0),
        Fit(lambda _: _tier_rows(tiers, 0, numbers[:-1]), 0, 0),
    )


def _tier_rows(
    tiers: Sequence[common_pb2.TierUsage], bar_cells: int, numbers: Sequence[str]
) -> Table:
    used = ["used"] if bar_cells else []
    rows = table("\nTiers", "tier", ">capacity", *used, *(f">{n}" for n in numbers), ">blocks")
    for usage in tiers:
        parts = [
            (usage.live_bytes, "green"),
            (usage.pending_bytes, "yellow"),
            (usage.quarantined_bytes, "red"),
        ]
        # Of HBM the master knows the blocks alone: an engine owns its pages.
        known = bool(usage.capacity_bytes)
        rows.add_row(
            tier_text(usage.tier),
            size(usage.capacity_bytes) if known else "–",
            *([bar(parts, usage.capacity_bytes, bar_cells) if known else ""] if used else []),
            *(size(_bytes(usage, name)) if known else "–" for name in numbers),
            f"{usage.blocks:,}",
        )
    return rows


def _bytes(usage: common_pb2.TierUsage, name: str) -> int:
    return int(getattr(usage, f"{name}_bytes"))


def _print_namespaces(out: Console, namespaces: list[admin_pb2.NamespaceInfo]) -> None:
    models = widest_of(info.spec.model for info in namespaces)
    least = min(models, MODEL_CELLS_LEAST)
    print_fitting(
        out,
        Fit(lambda cells: _namespace_rows(namespaces, cells, kv=True), models, least),
        Fit(lambda cells: _namespace_rows(namespaces, cells, kv=False), models),
    )


def _namespace_rows(
    namespaces: Sequence[admin_pb2.NamespaceInfo], model_cells: int, *, kv: bool
) -> Table:
    tenants = any(info.tenant != DEFAULT_TENANT for info in namespaces)
    tenant = ["tenant"] if tenants else []
    kinds = ["KV"] if kv else []
    rows = table("\nNamespaces", "root", "model", *tenant, *kinds, ">a block", ">blocks")
    for info in namespaces:
        rows.add_row(
            short(info.root),
            cut(info.spec.model, model_cells),
            *([info.tenant] if tenants else []),
            *([f"{info.spec.attention} {info.spec.kv_dtype}"] if kv else []),
            f"{info.spec.block_tokens} tokens, {size(info.spec.block_bytes)}",
            f"{info.blocks:,}",
        )
    return rows
