"""``kvstore blocks``: which blocks are indexed, and where."""

from typing import Annotated, Any

import typer
from kvstore_proto import admin_pb2

from kvstore.cli.connection import connect
from kvstore.cli.options import (
    DEFAULT_MASTER,
    JsonOption,
    MasterOption,
    NamespaceOption,
    NodeOption,
    TierName,
    read_keys,
    tier_number,
)
from kvstore.cli.output import (
    ENGINE_DIGITS,
    console,
    count,
    cut,
    print_json,
    short,
    size,
    table,
    tier_name,
    tier_text,
)


def blocks(
    namespace: NamespaceOption = "",
    node: NodeOption = "",
    tier: Annotated[TierName | None, typer.Option(help="Only this tier.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows to show.")] = 100,
    after: Annotated[
        str, typer.Option(metavar="KEY", help="Go on after this key: the end of the page before.")
    ] = "",
    master: MasterOption = DEFAULT_MASTER,
    as_json: JsonOption = False,
) -> None:
    """List blocks, one row for each place that has one.

    [bold]Examples[/bold]
      [cyan]kvstore blocks --tier ssd --limit 20[/cyan]
      [cyan]kvstore blocks --node node-1 --json | jq -r '.blocks[].key'[/cyan]
    """
    request = admin_pb2.ListBlocksRequest(
        node_id=node, tier=tier_number(tier), limit=limit, after=read_keys(after)
    )
    with connect(master) as admin:
        request.root = admin.root(namespace)
        answer = admin.call("ListBlocks", request)
        models = {info.root: info.spec.model for info in admin.namespaces()}
    if as_json:
        print_json(
            {"blocks": [block_json(block) for block in answer.blocks], "next": answer.next.hex()}
        )
        return
    if not answer.blocks:
        console().print("No such block is indexed.")
        return
    rows = table("", "key", "tier", "node", "engine", "model", ">size")
    rows.columns[4].no_wrap = False
    for block in answer.blocks:
        rows.add_row(
            short(block.key),
            tier_text(block.tier),
            block.node_id,
            block.engine_id[:ENGINE_DIGITS],
            cut(models.get(block.root, short(block.root))),
            size(block.bytes),
        )
    out = console()
    out.print(rows)
    out.print(f"{count(len(answer.blocks), 'row')}.")
    if answer.next:
        out.print(f"There is more: kvstore blocks --after {answer.next.hex()}", soft_wrap=True)


def block_json(block: admin_pb2.BlockInfo) -> dict[str, Any]:
    """One row."""
    return {
        "key": block.key.hex(),
        "namespace": block.root.hex(),
        "node_id": block.node_id,
        "tier": tier_name(block.tier),
        "engine_id": block.engine_id,
        "bytes": block.bytes,
    }
