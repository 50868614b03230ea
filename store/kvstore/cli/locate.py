"""``kvstore locate``: what of a prompt is where."""

import sys
from typing import Annotated, Any

import typer
from kvstore_proto import admin_pb2, common_pb2
from rich.text import Text

from kvstore.cli.connection import connect
from kvstore.cli.options import DEFAULT_MASTER, JsonOption, MasterOption, NamespaceOption
from kvstore.cli.output import (
    ENGINE_DIGITS,
    TIER_STYLES,
    console,
    count,
    end_name,
    print_json,
    table,
    tier_name,
    tier_text,
)
from kvstore.errors import InvalidArgumentError, KVStoreError

PICTURE_CELLS = 32
TOKEN_MAX = (1 << 32) - 1
STDIN = "-"


def locate(
    tokens: Annotated[
        str,
        typer.Option(metavar="IDS", help="Token ids, separated by commas or spaces; - for stdin."),
    ] = "",
    text: Annotated[str, typer.Option(help="The prompt as text; - for stdin.")] = "",
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="For --text: model directory, tokenizer.json, GGUF file, or bundled model's name.",
        ),
    ] = "",
    namespace: NamespaceOption = "",
    salt: Annotated[str, typer.Option(help="The prompt's cache salt, if it had one.")] = "",
    master: MasterOption = DEFAULT_MASTER,
    as_json: JsonOption = False,
) -> None:
    """Show which blocks of a prompt are cached, in which tier of which node.

    Only full blocks have a key; the tokens after the last one are never cached.

    [bold]Examples[/bold]
      [cyan]kvstore locate --tokens 1,2,3,4,5,6,7,8[/cyan]
      [cyan]kvstore locate --text "$(cat prompt.txt)" --tokenizer ~/models/llama[/cyan]
      [cyan]kvstore locate --text - --tokenizer smollm2-135m-instruct < prompt.txt[/cyan]
    """
    ids = _read_tokens(tokens, text, tokenizer)
    with connect(master) as admin:
        request = admin_pb2.LocatePromptRequest(
            root=admin.root(namespace), tokens=ids, cache_salt=salt
        )
        answer = admin.call("LocatePrompt", request)
    if as_json:
        print_json(located_json(answer, len(ids)))
    else:
        _print(answer, len(ids))


def _read_tokens(tokens: str, text: str, tokenizer: str) -> list[int]:
    if bool(tokens) == bool(text):
        raise typer.BadParameter("give the prompt as --tokens or as --text")
    if text and not tokenizer:
        raise typer.BadParameter("--text needs --tokenizer")
    given = sys.stdin.read() if STDIN in (tokens, text) else tokens or text
    return _encode(given, tokenizer) if text else _parse_ids(given)


def _parse_ids(given: str) -> list[int]:
    try:
        ids = [int(part) for part in given.replace(",", " ").split()]
    except ValueError as error:
        raise typer.BadParameter(f"--tokens: {error}") from None
    if any(not 0 <= i <= TOKEN_MAX for i in ids):
        raise typer.BadParameter(f"--tokens: a token id is 0 to {TOKEN_MAX}")
    return ids


def _encode(text: str, tokenizer: str) -> list[int]:
    # The engine is an extra of the package; without it the CLI still does everything else.
    try:
        from kvstore_engine.tokenizer import load_tokenizer
    except ImportError as error:
        raise InvalidArgumentError(
            f"--text needs the engine's packages ({error.name} is missing): pip install "
            "'kvstore[engine]', or pass --tokens"
        ) from None
    try:
        return list(load_tokenizer(tokenizer).encode(text))
    except KVStoreError as error:
        raise InvalidArgumentError(f"--tokenizer: {error}") from None


def located_json(answer: admin_pb2.LocatePromptResponse, tokens: int) -> dict[str, Any]:
    """The answer, with the counts of tokens that people ask for."""
    return {
        "tokens": tokens,
        "block_tokens": answer.block_tokens,
        "blocks": answer.blocks,
        "found": answer.found,
        "found_tokens": answer.found * answer.block_tokens,
        "end": end_name(answer.end),
        "runs": [
            {
                "first": run.first,
                "count": run.count,
                "tier": tier_name(run.tier),
                "node_id": run.node_id,
                "engine_id": run.engine_id,
            }
            for run in answer.runs
        ],
    }


def _print(answer: admin_pb2.LocatePromptResponse, tokens: int) -> None:
    out = console()
    over = tokens - answer.blocks * answer.block_tokens
    partial = f" and {count(over, 'token')} that fill none" if over else ""
    share = 100 * answer.found * answer.block_tokens / max(tokens, 1)
    out.print(
        f"{count(tokens, 'token')}: {count(answer.blocks, 'block')} of "
        f"{answer.block_tokens}{partial}"
    )
    out.print(
        f"[bold]{count(answer.found, 'leading block')} cached[/bold] "
        f"({answer.found * answer.block_tokens:,} tokens, {share:.0f} % of the prompt)"
    )
    if answer.found < answer.blocks:
        out.print(f"block {answer.found}: {end_name(answer.end).replace('_', ' ')}")
    if not answer.runs:
        return
    rows = table("", "tier", "node", "engine", ">blocks", ">from", ">to", "prompt")
    for run in answer.runs:
        rows.add_row(
            tier_text(run.tier),
            run.node_id,
            run.engine_id[:ENGINE_DIGITS],
            f"{run.count:,}",
            str(run.first),
            str(run.first + run.count - 1),
            _picture(run, answer.blocks),
        )
    out.print(rows)


def _picture(run: common_pb2.LocatedRun, blocks: int) -> Text:
    """Where in the prompt a run lies."""
    start = PICTURE_CELLS * run.first // blocks
    end = max(start + 1, PICTURE_CELLS * (run.first + run.count) // blocks)
    text = Text("░" * start, style="bright_black")
    text.append("█" * (end - start), style=TIER_STYLES.get(tier_name(run.tier), ""))
    return text.append("░" * (PICTURE_CELLS - end), style="bright_black")
