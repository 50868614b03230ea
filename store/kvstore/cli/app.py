"""The ``kvstore`` command put together."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

# The library's own lines about a peer that is away would stand beside the command's clear one.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer

import kvstore
from kvstore.cli.blocks import blocks
from kvstore.cli.fsck import fsck
from kvstore.cli.locate import locate
from kvstore.cli.nodes import nodes
from kvstore.cli.removal import evict, purge
from kvstore.cli.status import status
from kvstore.cli.stdout import EXIT_FAILED, checked_stdout
from kvstore.cli.up import up
from kvstore.cli.version import version
from kvstore.config import check_text
from kvstore.entry import EXIT_INTERRUPTED
from kvstore.errors import InvalidArgumentError, KVStoreError

EXIT_USAGE = 2

app = typer.Typer(
    name="kvstore",
    epilog="Start here:  [cyan]kvstore up --data-dir ~/kvstore --dram 4GiB --ssd 32GiB[/cyan]",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvstore {kvstore.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
    ] = False,
) -> None:
    """A tiered store for the KV cache of LLM inference: start one, look into it, clear it."""


for command in (up, status, nodes, blocks, locate, evict, purge, fsck, version):
    app.command()(command)


def run(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exits with 0, with 1 if it failed, with 2 for wrong usage."""
    try:
        _check_texts(sys.argv[1:] if argv is None else argv)
        with checked_stdout():
            app(args=argv)
    except KVStoreError as error:
        sys.stderr.write(f"kvstore: {error}\n")
        usage = isinstance(error, InvalidArgumentError)
        raise SystemExit(EXIT_USAGE if usage else EXIT_FAILED) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def _check_texts(arguments: Sequence[str]) -> None:
    """ConfigError where an argument or a variable of kvstore is not UTF-8."""
    for argument in arguments:
        check_text(argument, "argument")
    for name, value in os.environ.items():
        if name.startswith("KVSTORE_"):
            check_text(value, f"environment variable {name}")
