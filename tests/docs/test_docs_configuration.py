"""docs/configuration.md names every setting that there is, and none else."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from kvstore.cli.up import up
from kvstore.config import AnyDataclass, build_config, format_size
from kvstore.master.config import MasterConfig
from kvstore.node.settings import NodeConfig
from kvstore_connector.config import _SIZES, ConnectorConfig
from kvstore_engine.config import KVTransferConfig, parse_kv_transfer_config
from kvstore_engine.server.config import ServerConfig

from tests.docs.pages import ROOT, code, fenced, page, rows, section, table

PAGE = page("docs/configuration.md")
DAEMONS: dict[str, type[AnyDataclass]] = {
    "kvstore-master": MasterConfig,
    "kvstore-node": NodeConfig,
    "kvstore-engine": ServerConfig,
}


def shown(default: Any, *, size: bool = False) -> str:
    """A default as the page writes it."""
    if default is MISSING or default is msgspec.NODEFAULT:
        return "required"
    if default in ("", None):
        return "empty" if default == "" else "none"
    home = str(Path.home())
    text = format_size(default) if size else str(default)
    return f"`{text.replace(home, '~')}`"


@pytest.mark.parametrize("command", DAEMONS)
def test_flags_of_a_daemon_and_their_defaults(command: str) -> None:
    settings = {
        "--" + field.name.replace("_", "-"): shown(field.default, size=field.metadata["size"])
        for field in fields(DAEMONS[command])
    }
    assert {flag: row[0] for flag, row in table(section(PAGE, command)).items()} == settings


@pytest.mark.parametrize("command", DAEMONS)
def test_samples_are_configurations(command: str, tmp_path: Path) -> None:
    (sample,) = fenced(section(PAGE, command), "toml")
    file = tmp_path / "sample.toml"
    file.write_text(sample)
    config: Any = build_config(DAEMONS[command], file=file)
    if isinstance(config, ServerConfig):
        assert config.engine().kv_transfer_config is not None


def test_flags_of_up_and_their_defaults() -> None:
    app = typer.Typer()
    app.command()(up)
    flags: dict[str, str] = {}
    for option in typer.main.get_command(app).params:
        if "--help" not in option.opts and "--show-completion" not in option.opts:
            long = next(name for name in option.opts if name.startswith("--"))
            flags[long] = shown(option.default)
    flags.pop("--install-completion", None)
    named = {flag: row[0] for flag, row in table(section(PAGE, "kvstore up")).items()}
    assert named.keys() == flags.keys()
    for flag, default in flags.items():
        if default == "empty":  # it is made of another flag
            assert code(named[flag]), flag
        else:
            assert named[flag] == default, flag


def test_keys_of_kv_transfer_config() -> None:
    keys = {field.name: shown(field.default) for field in msgspec.structs.fields(KVTransferConfig)}
    keys["kv_connector_extra_config"] = "`{}`"
    named = {key: row[0] for key, row in table(section(PAGE, "kv_transfer_config")).items()}
    assert named == keys
    assert parse_kv_transfer_config('{"kv_connector":"KVStoreConnector"}').kv_role == "kv_both"


def test_keys_of_kv_connector_extra_config() -> None:
    keys = {
        field.name: shown(field.default, size=field.name in _SIZES)
        for field in fields(ConnectorConfig)
        if field.name != "role"
    }
    named = {key: row[0] for key, row in table(section(PAGE, "kv_connector_extra_config")).items()}
    assert named == keys


def test_ports_are_the_defaults() -> None:
    listed = rows(section(PAGE, "Ports"))
    ports = {cells[1]: cells[0] for cells in listed if cells[0].isdecimal()}
    assert ports == {
        "`kvstore-engine --port`": str(ServerConfig(model="m").port),
        "`kvstore-master --listen`": MasterConfig().listen.rpartition(":")[2],
        "`kvstore-node --metrics-listen`": NodeConfig().metrics_listen.rpartition(":")[2],
        "`kvstore-master --metrics-listen`": MasterConfig().metrics_listen.rpartition(":")[2],
    }


def test_environment_prefixes_are_those_of_the_commands() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "store").rglob("*.py"))
    sources += "".join(path.read_text() for path in (ROOT / "engine").rglob("*.py"))
    for name in ("KVSTORE_MASTER", "KVSTORE_NODE", "KVSTORE_ENGINE"):
        assert f"`{name}_LOG_LEVEL`" in PAGE
        assert f'env_prefix="{name}_"' in sources
    assert 'envvar="KVSTORE_MASTER"' in sources
