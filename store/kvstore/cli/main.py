"""The ``kvstore`` command put together."""

import os
import sys
from collections.abc import Sequence

# The library's own lines about a peer that is away would stand beside the command's clear one.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer

from kvstore.cli.blocks import blocks
from kvstore.cli.fsck import fsck
from kvstore.cli.locate import locate
from kvstore.cli.nodes import nodes
from kvstore.cli.removal import evict, purge
from kvstore.cli.status import status
from kvstore.cli.up import up
from kvstore.cli.version import version
from kvstore.errors import InvalidArgumentError, KVStoreError

EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="kvstore",
    help="A tiered store for the KV cache of LLM inference: start one, look into it, clear it.",
    epilog="Start here:  [cyan]kvstore up --data-dir ~/kvstore --dram 4GiB --ssd 32GiB[/cyan]",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (up, status, nodes, blocks, locate, evict, purge, fsck, version):
    app.command()(command)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with 0, with 1 if the command failed, with 2 for wrong usage."""
    try:
        app(args=argv)
    except KVStoreError as error:
        sys.stderr.write(f"kvstore: {error}\n")
        usage = isinstance(error, InvalidArgumentError)
        raise SystemExit(EXIT_USAGE if usage else EXIT_FAILED) from None


if __name__ == "__main__":
    main()
