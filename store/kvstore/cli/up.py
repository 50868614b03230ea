"""``kvstore up``: master and node on this machine, in the foreground."""

import asyncio
import contextlib
import json
import shlex
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvstore.cli.children import EXIT_USAGE, Child, ChildEndedError
from kvstore.cli.options import DEFAULT_MASTER, size_option
from kvstore.cli.output import console, print_json
from kvstore.config import check_path, check_socket_path
from kvstore.daemon import check_address, stop_event
from kvstore.errors import ConfigError
from kvstore.node.settings import NodeConfig

SIGNAL_SPREAD_S = 0.3
DEFAULT_DATA_DIR = Path.home() / ".local" / "share" / "kvstore"


_DataDir = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        help="Directory of this store, its SSD tier included.",
        show_default="~/.local/share/kvstore",
    ),
]
_SsdAdmission = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        help="Which blocks are written to SSD: always, second-use (once used again), or "
        "reuse (what is used more than what it displaces).",
    ),
]
_ScrubRate = Annotated[
    float,
    typer.Option(
        "--scrub-mb-s",
        metavar="MB/S",
        help="How fast SSD blocks are verified in the background; 0: not at all.",
    ),
]
_Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow addresses that others on the network reach.")
]


def up(
    data_dir: _DataDir = str(DEFAULT_DATA_DIR),
    dram: Annotated[str, size_option("--dram", "Size of the DRAM tier, in /dev/shm.")] = "1GiB",
    ssd: Annotated[str, size_option("--ssd", "Size of the SSD tier; 0: none.")] = "8GiB",
    ssd_admission: _SsdAdmission = NodeConfig.ssd_admission,
    scrub_mb_s: _ScrubRate = NodeConfig.scrub_mb_s,
    listen: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Of the node: unix:PATH [DATA_DIR/node.sock]."),
    ] = "",
    master_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Of the master.")
    ] = DEFAULT_MASTER,
    metrics_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Prometheus of the node; empty: none.")
    ] = "127.0.0.1:9401",
    master_metrics_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Prometheus of the master; empty: none.")
    ] = "127.0.0.1:9402",
    ssd_dir: Annotated[
        str,
        typer.Option(metavar="DIR", help="Directory of the SSD tier [DATA_DIR/node/ssd]."),
    ] = "",
    pool_dir: Annotated[
        str, typer.Option(metavar="DIR", help="File system in memory for the DRAM tier.")
    ] = "/dev/shm",
    insecure: _Insecure = False,
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")
    ] = "warning",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the endpoints as one JSON document.")
    ] = False,
) -> None:
    """Run a master and a node on this machine until Ctrl-C.

    What is on SSD is found again at the next start. Stops both when one of them ends.

    [bold]Examples[/bold]
      [cyan]kvstore up --data-dir ~/kvstore --dram 4GiB --ssd 32GiB[/cyan]
      [cyan]kvstore up --data-dir /tmp/kvstore --ssd 0 --metrics-listen ""[/cyan]
    """
    for flag, path in {"--data-dir": data_dir, "--pool-dir": pool_dir}.items():
        check_path(path, flag)
    if ssd_dir:
        check_path(ssd_dir, "--ssd-dir")
    folder = _made(data_dir)
    listen = listen or f"unix:{folder}/node.sock"
    _check_addresses(
        {
            "--master-listen": master_listen,
            "--listen": listen,
            "--metrics-listen": metrics_listen,
            "--master-metrics-listen": master_metrics_listen,
        },
        insecure=insecure,
    )
    shared = ["--log-level", log_level, "--insecure", str(insecure)]
    master = ["--data-dir", str(folder / "master"), "--listen", master_listen, *shared]
    master += ["--metrics-listen", master_metrics_listen]
    node = ["--data-dir", str(folder / "node"), *shared]
    node += ["--listen", listen, "--ssd-dir", ssd_dir]
    node += ["--dram", dram, "--ssd", ssd, "--pool-dir", pool_dir]
    node += ["--metrics-listen", metrics_listen, "--scrub-mb-s", str(scrub_mb_s)]
    node += ["--ssd-admission", ssd_admission]

    show = partial(_show_started, {"DRAM": dram, "SSD": ssd}, folder, as_json)
    asyncio.run(_run(master, node, show))


def _made(data_dir: str) -> Path:
    folder = Path(data_dir).expanduser().absolute()
    check_path(str(folder), "--data-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--data-dir {folder}: {error.strerror}") from None
    return folder


def _check_addresses(by_flag: dict[str, str], *, insecure: bool) -> None:
    """ConfigError with this command's flag; a daemon would name its own."""
    for flag, address in by_flag.items():
        if address:
            check_socket_path(address, flag)
            check_address(address, flag, insecure=insecure)


def _show_started(
    tiers: dict[str, str], data_dir: Path, as_json: bool, endpoints: dict[str, str]
) -> None:
    if as_json:
        print_json({**endpoints, "kv_transfer_config": transfer_config(endpoints["node"])})
    else:
        _show(endpoints, tiers, data_dir)


async def _run(master: list[str], node: list[str], show: Callable[[dict[str, str]], None]) -> None:
    """Starts the master, then the node on it; ends both, the node first."""
    stop = stop_event()
    stopping = asyncio.ensure_future(stop.wait())
    async with contextlib.AsyncExitStack() as stack:
        children, endpoints = [], {}
        for name, module, arguments in (
            ("master", "kvstore.master.daemon", master),
            ("node", "kvstore.node.daemon", node),
        ):
            child = await Child.start(f"kvstore-{name}", module, arguments)
            stack.push_async_callback(child.stop)
            children.append(child)
            ready = asyncio.ensure_future(child.ready())
            await asyncio.wait((ready, stopping), return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                ready.cancel()
                raise typer.Exit(128 + stop.signum)
            endpoints[name] = await _started(ready)
            if name == "master":
                node += ["--master", endpoints[name]]
        show(endpoints)
        await _watch(children, stopping)


async def _started(ready: Awaitable[str]) -> str:
    """The address of a child; wrong usage of a child is wrong usage of this command."""
    try:
        return await ready
    except ChildEndedError as error:
        if error.child_code == EXIT_USAGE:
            raise ConfigError(str(error)) from None
        raise


async def _watch(children: list[Child], stopping: "asyncio.Task[Literal[True]]") -> None:
    """Returns when this process is told to stop; ChildEndedError when a child ends before."""
    ends = [asyncio.ensure_future(child.ended()) for child in children]
    waiting: list[asyncio.Task[Any]] = [*ends, stopping]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    # A signal to the whole process group may have ended a child sooner than it came here.
    await asyncio.wait((stopping,), timeout=SIGNAL_SPREAD_S)
    for end in ends:
        if end.done() and not stopping.done():
            raise end.result()


def transfer_config(node: str) -> str:
    """What an engine takes as ``--kv-transfer-config`` to use this node."""
    config = {
        "kv_connector": "KVStoreConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"node": node},
    }
    return json.dumps(config, separators=(",", ":"))


def _show(endpoints: dict[str, str], sizes: dict[str, str], data_dir: Path) -> None:
    out = console()
    tiers = ", ".join(f"{tier} {size}" for tier, size in sizes.items() if size != "0")
    option = "" if endpoints["master"] == DEFAULT_MASTER else f" --master {endpoints['master']}"
    config = shlex.quote(transfer_config(endpoints["node"]))
    for line in (
        f"[bold green]kvstore is up[/bold green] with {tiers} in {data_dir}. Ctrl-C stops it.",
        f"  master  {endpoints['master']}",
        f"  node    {endpoints['node']}",
        "",
        "Run an engine on it:",
    ):
        out.print(line, soft_wrap=True)
    # Not through markup: this line is to be copied as it stands.
    out.print(
        f"  kvstore-engine --model smollm2-135m-instruct --kv-transfer-config {config}",
        markup=False,
        soft_wrap=True,
    )
    out.print(f"Look into it:\n  kvstore status{option}", soft_wrap=True)
    out.file.flush()
