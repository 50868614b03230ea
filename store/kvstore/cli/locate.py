"""``kvstore locate``: what of a prompt is where."""

import sys
from typing import Annotated, Any

import typer
from kvstore_proto import admin_pb2, common_pb2
from rich.table import Table
from rich.text import Text

from kvstore.cli.connection import Admin, connect
from kvstore.cli.options import DEFAULT_MASTER, JsonOption, MasterOption, NamespaceOption
from kvstore.cli.output import (
    ENGINE_DIGITS,
    TIER_STYLES,
    Fit,
    console,
    count,
    cut,
    end_name,
    print_fitting,
    print_json,
    short,
    table,
    tier_name,
    tier_text,
    widest_of,
)
from kvstore.errors import InvalidArgumentError, KVStoreError

PICTURE_CELLS = 32
TOKEN_MAX = (1 << 32) - 1
STDIN = "-"
RAW = "raw"  # the attention of a namespace that is no model's


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

    A chat is looked up by the tokens that its template makes of it: ask the engine for them,
    with the messages of the request (chat.json here).

    [bold]Examples[/bold]
      [cyan]kvstore locate --tokens 1,2,3,4,5,6,7,8[/cyan]
      [cyan]kvstore locate --text "$(cat prompt.txt)" --tokenizer ~/models/llama[/cyan]
      [cyan]kvstore locate --text - --tokenizer smollm2-135m-instruct < prompt.txt[/cyan]
      [cyan]jq '{messages}' chat.json > asked.json[/cyan]
      [cyan]curl -s localhost:8000/tokenize -d @asked.json | jq '.tokens[]' > ids[/cyan]
      [cyan]kvstore locate --tokens - < ids[/cyan]
    """
    ids = _read_tokens(tokens, text, tokenizer)
    with connect(master) as admin:
        request = admin_pb2.LocatePromptRequest(
            root=_root(admin, namespace, of_model=bool(text)), tokens=ids, cache_salt=salt
        )
        answer = admin.call("LocatePrompt", request)
    if as_json:
        print_json(located_json(answer, len(ids)))
    else:
        _print(answer, len(ids))


def _root(admin: Admin, namespace: str, *, of_model: bool) -> bytes:
    """The namespace that is meant; empty where it is the master's to say."""
    if namespace or not of_model:
        return admin.root(namespace)
    meant = [n for n in admin.namespaces() if n.blocks and n.spec.attention != RAW]
    if len(meant) > 1:
        listed = ", ".join(f"{short(n.root)} ({n.spec.model})" for n in meant)
        raise InvalidArgumentError(f"several namespaces have blocks; pass --namespace: {listed}")
    return meant[0].root if meant else b""


def _read_tokens(tokens: str, text: str, tokenizer: str) -> list[int]:
    if bool(tokens) == bool(text):
        raise typer.BadParameter("give the prompt as --tokens or as --text")
    if text and not tokenizer:
        raise typer.BadParameter("--text needs --tokenizer")
    given = _read_stdin(is_text=bool(text)) if STDIN in (tokens, text) else tokens or text
    return _encode(given, tokenizer) if text else _parse_ids(given)


def _read_stdin(*, is_text: bool) -> str:
    if sys.stdin is None:
        raise InvalidArgumentError("stdin is closed; there is no prompt to read")
    try:
        given = sys.stdin.read()
        given.encode()  # some locales let other bytes through, as surrogates
    except UnicodeError:
        raise InvalidArgumentError("stdin is not valid UTF-8; a prompt is text") from None
    if not (given if is_text else given.strip()):  # spaces are a text, and no token ids
        raise InvalidArgumentError("stdin is empty; there is no prompt in it")
    return given


def _parse_ids(given: str) -> list[int]:
    try:
        ids = [int(part) for part in given.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(
            "--tokens: token ids are whole numbers, such as 1,2,3; a text is given as --text"
        ) from None
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
    nodes = widest_of(run.node_id for run in answer.runs)
    print_fitting(
        out,
        Fit(lambda cells: _rows(answer, cells, nodes), PICTURE_CELLS),
        Fit(lambda cells: _rows(answer, 0, cells), nodes),
    )


def _rows(answer: admin_pb2.LocatePromptResponse, picture_cells: int, node_cells: int) -> Table:
    engine = ["engine"] if any(run.engine_id for run in answer.runs) else []
    picture = ["prompt"] if picture_cells else []
    rows = table("", "tier", "node", *engine, ">blocks", ">from", ">to", *picture)
    for run in answer.runs:
        rows.add_row(
            tier_text(run.tier),
            cut(run.node_id, node_cells),
            *([run.engine_id[:ENGINE_DIGITS]] if engine else []),
            f"{run.count:,}",
            str(run.first),
            str(run.first + run.count - 1),
            *([_picture(run, answer.blocks, picture_cells)] if picture else []),
        )
    return rows


def _picture(run: common_pb2.LocatedRun, blocks: int, cells: int) -> Text:
    """Where in the prompt a run lies."""
    start = min(cells * run.first // blocks, cells - 1)
    end = max(start + 1, cells * (run.first + run.count) // blocks)
    text = Text("░" * start, style="bright_black")
    text.append("█" * (end - start), style=TIER_STYLES.get(tier_name(run.tier), ""))
    return text.append("░" * (cells - end), style="bright_black")
