"""Paths that cannot be meant are refused before anything is made of them."""

from pathlib import Path

import pytest
from kvstore.config import build_config
from kvstore.errors import ConfigError
from kvstore.master.config import MasterConfig
from kvstore.node.settings import NodeConfig

from tests.cli.store import Store, short_directory
from tests.cli.test_cli_refusals import refused

CONTROL = "has a control character; take another path"
EMPTY = "is an empty path; name one, such as "


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--data-dir", "", f"--data-dir '' {EMPTY}"),
        ("--pool-dir", "", f"--pool-dir '' {EMPTY}"),
        ("--listen", "unix:", f"--listen 'unix:' {EMPTY}"),
        ("--master-listen", "unix:", f"--master-listen 'unix:' {EMPTY}"),
        ("--data-dir", "{}/a\nb", CONTROL),
        ("--pool-dir", "{}/a\rb", CONTROL),
        ("--ssd-dir", "{}/a\tb", CONTROL),
        ("--listen", "unix:{}/a\nb", CONTROL),
        ("--master-listen", "unix:{}/a\x1bb", CONTROL),
        ("--listen", "unix:{}", "is a directory; name a file in it, with --listen"),
    ],
)
def test_up(
    flag: str,
    value: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with short_directory() as folder:
        monkeypatch.chdir(folder)
        given = {"--data-dir": str(folder), "--master-listen": "127.0.0.1:0"}
        given |= {"--metrics-listen": "", "--master-metrics-listen": ""}
        given |= {flag: value.format(folder)}
        error = refused(capsys, 2, "up", *(part for pair in given.items() for part in pair))
        assert says in error
        assert flag in error
        assert not list(folder.iterdir())


@pytest.mark.parametrize("cls", [NodeConfig, MasterConfig])
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("data_dir", "", EMPTY),
        ("data_dir", "a\nb", CONTROL),
        ("data_dir", "a\udcff", "is not valid UTF-8"),
        ("listen", "unix:", "unix:"),
        ("listen", "unix:/tmp/a\rb", CONTROL),
        ("listen", "unix:/tmp/a\udcff", "is not valid UTF-8"),
    ],
)
def test_a_daemon(
    cls: type[NodeConfig] | type[MasterConfig], name: str, value: str, says: str
) -> None:
    for given in ({"flags": {name: value}}, {"environ": {f"K_{name.upper()}": value}}):
        with pytest.raises(ConfigError) as error:
            build_config(cls, env_prefix="K_", **given)  # type: ignore[arg-type]
        assert says in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("pool_dir", "", EMPTY), ("pool_dir", "a\nb", CONTROL), ("ssd_dir", "a\nb", CONTROL)],
)
def test_a_node(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_config(NodeConfig, flags={name: value})
    assert says in str(error.value)


def test_a_relative_directory_below_one_with_a_control_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a\nb").mkdir()
    monkeypatch.chdir(tmp_path / "a\nb")
    with pytest.raises(ConfigError, match="control character"):
        NodeConfig(data_dir=Path("data"))


def test_a_pool_without_room_is_named_as_it_was_asked_for() -> None:
    with short_directory() as folder:
        store = Store(folder, "--dram", "1000TiB")
        try:
            assert store.process.wait(20) == 2
            assert "1000 TiB are needed" in store.error()
        finally:
            store.clean_up()
