"""``kvstore blocks``: which blocks are indexed, and where."""

import shlex
from typing import Annotated, Any

import typer
from kvstore_proto import admin_pb2
from rich.console import Console
from rich.table import Table

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
    Fit,
    console,
    count,
    cut,
    print_fitting,
    print_json,
    short,
    size,
    table,
    tier_name,
    tier_text,
    widest_of,
)

LIMIT = 100


def blocks(
    namespace: NamespaceOption = "",
    node: NodeOption = "",
    tier: Annotated[
        TierName | None, typer.Option(help="Only this tier.", case_sensitive=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows to show.")] = LIMIT,
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
    out = console()
    _print(out, answer, models)
    out.print(f"{count(len(answer.blocks), 'row')}.")
    if answer.next:
        given = {"--namespace": namespace, "--node": node, "--tier": tier.value if tier else ""}
        given |= {"--limit": "" if limit == LIMIT else str(limit)}
        given |= {"--master": "" if master == DEFAULT_MASTER else master}
        options = [part for flag, value in given.items() if value for part in (flag, value)]
        more = shlex.join(["kvstore", "blocks", *options, "--after", answer.next.hex()])
        out.print(f"There is more: {more}", markup=False, soft_wrap=True)


def _print(out: Console, answer: admin_pb2.ListBlocksResponse, models: dict[bytes, str]) -> None:
    named = {block.root: models.get(block.root, short(block.root)) for block in answer.blocks}

    def rows(model_cells: int, node_cells: int) -> Table:
        model = ["model"] if model_cells else []
        result = table("", "key", "tier", "node", "engine", *model, ">size")
        for block in answer.blocks:
            result.add_row(
                short(block.key),
                tier_text(block.tier),
                cut(block.node_id, node_cells),
                block.engine_id[:ENGINE_DIGITS],
                *([cut(named[block.root], model_cells)] if model else []),
                size(block.bytes),
            )
        return result

    nodes = widest_of(block.node_id for block in answer.blocks)
    print_fitting(
        out,
        Fit(lambda cells: rows(cells, nodes), widest_of(named.values())),
        Fit(lambda cells: rows(0, cells), nodes),
    )


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
