"""``kvstore fsck``: an SSD directory, checked while its node does not run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kvstore.cli.options import JsonOption
from kvstore.cli.output import console, count, print_json, short, size, table
from kvstore.core.fsck import Finding, count_faults
from kvstore.errors import CorruptError
from kvstore.node import fsck as check
from kvstore.node.index_rebuild import DAMAGED_NAME
from kvstore.node.ssd_index import INDEX_NAME

EXIT_PROBLEMS = 1
ROWS_MAX = 20


def fsck(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="SSD directory of a node: its --ssd-dir, by default DATA_DIR/ssd, or "
            "DATA_DIR/node/ssd under `kvstore up`.",
        ),
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop bad records, durably; replace a damaged index.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check an SSD directory while its node is stopped: every record, every byte of every block.

    Finds records that are [red]malformed[/red], [red]foreign[/red] (of a namespace or format that
    this version cannot read), [red]outside[/red] of the data file, that [red]overlap[/red] others
    whose bytes are there, blocks that are [red]corrupt[/red] or [red]unreadable[/red],
    [red]orphans[/red] behind a missing block, and a data file of another length. Changes nothing
    without --repair; a dropped block is a miss afterwards, and computed again. An index that is
    damaged itself is replaced by --repair: by a new one of all records that can still be read and
    whose blocks have their bytes, among them perhaps some that were removed.

    Exit code: 0 clean, 1 problems were found (also when --repair has removed them),
    2 the directory cannot be checked: not one, in use, or of another format version.

    [bold]Examples[/bold]
      [cyan]kvstore fsck ~/.local/share/kvstore/node/ssd[/cyan]
      [cyan]kvstore fsck /var/lib/kvstore/ssd --repair[/cyan]
      [cyan]kvstore fsck /var/lib/kvstore/ssd --json | jq .faults[/cyan]
    """
    try:
        with _progress() as progress:
            report = check.fsck(folder, repair=repair, progress=progress)
    except CorruptError as error:
        if as_json:
            print_json(report_json(check.unreadable(folder, error)))
        raise
    if as_json:
        print_json(report_json(report))
    else:
        _print(report)
    if not report.clean:
        raise typer.Exit(EXIT_PROBLEMS)


@contextmanager
def _progress() -> Iterator[check.Progress]:
    """A bar on a terminal's stderr, and nothing elsewhere."""
    err = console(stderr=True)
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report_json(report: check.Report) -> dict[str, Any]:
    """The whole report; every bad record is listed."""
    return {
        "directory": str(report.folder),
        "clean": report.clean,
        "repaired": report.repaired,
        "records": report.records,
        "read_bytes": report.read_bytes,
        "data_bytes": report.data_bytes,
        "data_bytes_noted": report.data_bytes_noted,
        "wrong_size": report.wrong_size,
        "index_damage": report.index_damage,
        "faults": dict(count_faults(report.findings)),
        "findings": [finding_json(finding) for finding in report.findings],
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    """One bad record."""
    return {**finding._asdict(), "key": finding.key.hex()}


def _print(report: check.Report) -> None:
    out = console()
    seen = f"{count(report.records, 'record')}, {size(report.read_bytes)} read"
    if report.clean:
        out.print(f"[green]clean[/green]: {seen}.", soft_wrap=True)
        return
    if report.wrong_size:
        found = "missing" if report.data_bytes is None else size(report.data_bytes)
        out.print(
            f"[red]The data file is {found}[/red]; its node made it with "
            f"{size(report.data_bytes_noted or 0)}.",
            soft_wrap=True,
        )
    if report.index_damage:
        out.print(f"[red]{escape(report.index_damage)}[/red]", soft_wrap=True)
        out.print(
            f"A new index was made of {count(report.records, 'record')} that could be read; the "
            f"damaged one is kept as {INDEX_NAME}/{DAMAGED_NAME}.",
            soft_wrap=True,
        )
    if report.findings:
        _print_findings(report.findings)
    verb = "dropped" if report.repaired else "bad"
    out.print(f"{seen}; {count(len(report.findings), 'record')} {verb}.", soft_wrap=True)
    if not report.repaired:
        out.print("Drop them with --repair.", soft_wrap=True)


def _print_findings(findings: Sequence[Finding]) -> None:
    rows = table("", "fault", "key", ">at byte", ">size", "why")
    rows.columns[-1].no_wrap = False
    for finding in findings[:ROWS_MAX]:
        place = (f"{finding.ssd_offset:,}", size(finding.nbytes)) if finding.nbytes else ("", "")
        rows.add_row(finding.fault, f"{short(finding.key)}…", *place, finding.detail)
    out = console()
    out.print(rows)
    if len(findings) > ROWS_MAX:
        out.print(f"… and {len(findings) - ROWS_MAX:,} more; --json lists all.", soft_wrap=True)
