from dataclasses import dataclass
from pathlib import Path

import pytest
from kvstore.config import build_config, format_size, option, parse_command_line, parse_size
from kvstore.daemon import load_config_or_exit
from kvstore.errors import ConfigError
from kvstore.node.settings import NodeConfig


@dataclass(frozen=True)
class Sample:
    """Every type that a setting can have."""

    where: Path = option(text="a path")  # noqa: RUF009
    name: str = option("x", text="a name")
    count: int = option(1, text="a count")
    space: int = option(1 << 30, text="a size", size=True)
    rate: float = option(1.5, text="a rate")
    fast: bool = option(False, text="a switch")


def sample(tmp_path: Path, toml: str = "", **flags: str) -> Sample:
    file = tmp_path / "sample.toml"
    file.write_text(toml)
    return build_config(
        Sample, file=file, env_prefix="SAMPLE_", environ={}, flags={"where": "/w", **flags}
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("1GiB", 1 << 30),
        ("512 MiB", 512 << 20),
        ("2GB", 2 * 10**9),
        ("1.5k", 1500),
        ("8B", 8),
        ("3TiB", 3 << 40),
        (7, 7),
    ],
)
def test_parse_size(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


TOO_LARGE = ["99999999TiB", "8388608TiB", "9" * 400, "9" * 5000 + "GiB", 1 << 63]


@pytest.mark.parametrize("text", TOO_LARGE, ids=lambda text: str(text)[:12])
def test_a_size_beyond_what_a_message_holds(text: str | int) -> None:
    with pytest.raises(ConfigError, match="out of range; the most is 8388607TiB"):
        parse_size(text)
    assert parse_size("8388607TiB") == 8388607 << 40


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 potato", -1, True, 1.5, *TOO_LARGE])
def test_parse_size_refuses(text: str | int) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


@pytest.mark.parametrize("value", [0, 1, 4096, 1 << 20, 3 << 30, 5 << 40, 12345])
def test_format_size_is_read_back(value: int) -> None:
    assert parse_size(format_size(value)) == value


def test_flags_override_environment_overrides_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('where = "/toml"\ncount = 1\nname = "toml"\nspace = "2MiB"\nrate = 2\n')
    config = build_config(
        Sample,
        file=file,
        env_prefix="SAMPLE_",
        environ={"SAMPLE_COUNT": "2", "SAMPLE_NAME": "env", "SAMPLE_FAST": "true", "OTHER": "1"},
        flags={"name": "flag", "rate": None},
    )
    assert config == Sample(Path("/toml"), "flag", 2, 2 << 20, 2.0, True)


@pytest.mark.parametrize(
    ("toml", "names"),
    [
        ("cuont = 1", ["unknown key 'cuont'", "count"]),
        ('count = "1"', ["count", "str", "int"]),
        ("count = true", ["count", "bool"]),
        ("count = 1.5", ["count", "float"]),
        ("name = 1", ["name", "int"]),
        ('fast = "yes"', ["fast"]),
        ("space = 1.5", ["space"]),
        ('space = "much"', ["space", "much", "512MiB"]),
        ("rate = false", ["rate"]),
        ("count = ", ["sample.toml"]),
    ],
)
def test_bad_file_is_refused_with_the_key(tmp_path: Path, toml: str, names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        sample(tmp_path, toml)
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags", [{"count": "one"}, {"fast": "maybe"}, {"rate": "fast"}, {"space": "x"}]
)
def test_bad_flag_is_refused(tmp_path: Path, flags: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(flags))):
        sample(tmp_path, **flags)


def test_missing_file_setting_and_variable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        build_config(Sample, file=tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="pass --where"):
        build_config(Sample)
    with pytest.raises(ConfigError, match="SAMPLE_CUONT"):
        build_config(Sample, env_prefix="SAMPLE_", environ={"SAMPLE_CUONT": "1"})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        build_config(Sample, file=tmp_path / "binary.toml")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    file.write_text('where = "/toml"\n')
    parse = {"prog": "sample", "description": "A sample.", "env_prefix": "SAMPLE_"}
    argv = ["--config", str(file), "--space", "1KiB", "--fast"]
    config = parse_command_line(Sample, argv=argv, environ={}, **parse)
    assert (config.where, config.space, config.fast) == (Path("/toml"), 1024, True)
    with pytest.raises(ConfigError, match="--nonsense"):
        parse_command_line(Sample, argv=["--nonsense"], environ={}, **parse)
    with pytest.raises(SystemExit) as stop:
        load_config_or_exit(Sample, argv=["--count", "x"], environ={}, **parse)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("sample: flag for count: 'x'")
    with pytest.raises(SystemExit) as stop:
        parse_command_line(Sample, argv=["--help"], environ={}, **parse)
    assert stop.value.code == 0
    assert "[1GiB]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad",
    [
        {"dram": 4095},
        {"ssd_admission": "sometimes"},
        {"ssd_write_checks": "some"},
        {"ssd": 1},
        {"quarantine_s": -1.0},
        {"sessions_max": 0},
        {"node_id": "a/b"},
        {"node_id": "-x"},
    ],
)
def test_node_settings_refuse(tmp_path: Path, bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        NodeConfig(data_dir=tmp_path, **bad)  # type: ignore[arg-type]


def test_node_settings_defaults(tmp_path: Path) -> None:
    config = NodeConfig(data_dir=tmp_path)
    assert config.address == f"unix:{tmp_path}/node.sock"
    assert config.ssd_path == tmp_path / "ssd"
    assert NodeConfig(data_dir=tmp_path, ssd_dir="/x").ssd_path == Path("/x")
    assert NodeConfig().data_dir.is_absolute()
