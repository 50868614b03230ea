"""One way to build a daemon's configuration: TOML file, then environment, then flags.

A configuration is a frozen dataclass whose fields are ``str``, ``int``, ``float``, ``bool`` or
``Path``, made with ``option``. The same table gives the flags, their help and the checks; an
unknown key or a wrong type is a ``ConfigError`` that names it.
"""

import argparse
import os
import re
import tomllib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, get_type_hints

import kvstore
from kvstore.errors import ConfigError


class AnyDataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


ConfigT = TypeVar("ConfigT", bound=AnyDataclass)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B)?", re.IGNORECASE)
UNIX = "unix:"  # before the path of a socket, where an address is given
SIZE_END = 1 << 63  # bytes; what files and messages can say is below it
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_EXPECTED = {int: "not a whole number", float: "not a number", bool: "neither true nor false"}
_BOOLS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def option(default: Any = MISSING, *, text: str, size: bool = False) -> Any:
    """A configuration field; ``text`` is its help, ``size`` takes ``"1GiB"`` as well as bytes."""
    return field(default=default, metadata={"text": text, "size": size})


def parse_size(value: str | int) -> int:
    """Bytes from ``"512MiB"``, ``"2 GB"``, ``"4096"`` or a number; ConfigError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigError(f"size {value} is negative")
        return _in_range(value, value)
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"size {value!r} is not understood; write it like 512MiB or 2GB")
    unit = (match[2] or "").lower().removesuffix("b")
    base = 1024 if unit.endswith("i") else 1000
    nbytes = _in_range(float(match[1]) * base ** _POWERS[unit.removesuffix("i")], value)
    if not nbytes and match[1].strip("0."):
        raise ConfigError(f"size {value!r} is less than one byte; write 0 or at least 1")
    return nbytes


def _in_range(nbytes: float, written: str | int) -> int:
    if nbytes >= SIZE_END:
        raise ConfigError(f"size {str(written)[:40]} is out of range; the most is 8388607TiB")
    return int(nbytes)


def format_size(value: int) -> str:
    """``value`` bytes in the largest binary unit that keeps it whole, as ``parse_size`` reads."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value and value % 1024**power == 0:
            return f"{value // 1024**power}{unit}"
    return str(value)


def readable_size(value: int) -> str:
    """Bytes in a unit that people read: ``1.5 GiB``."""
    number = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{_one_digit(number)} {unit}"
        number /= 1024
    return f"{_one_digit(number)} TiB"


def check_text(value: str, name: str) -> None:
    """ConfigError where ``value``, which ``name`` was given as, is not UTF-8 in the system."""
    try:
        value.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(value).decode(errors="backslashreplace")
        raise ConfigError(f"{name} '{shown}' is not valid UTF-8; write it in UTF-8") from None


def check_path(value: str, name: str, *, such_as: str = "/var/lib/kvstore") -> None:
    """ConfigError where nobody can mean ``value``: empty, not UTF-8, or no line of text."""
    check_text(value, name)
    if not value.removeprefix(UNIX):
        raise ConfigError(f"{name} {value!r} is an empty path; name one, such as {such_as}")
    if any(unicodedata.category(letter) == "Cc" for letter in value):
        raise ConfigError(f"{name} {value!r} has a control character; take another path")


def check_socket_path(address: str, name: str) -> None:
    """``check_path`` for the path of ``unix:PATH``; any other address passes."""
    if address.startswith(UNIX):
        check_path(address, name, such_as="unix:/run/kvstore.sock")


def split_host_port(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; ConfigError otherwise."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"address {address!r}; write it like 127.0.0.1:9400")
    return host, int(port)


def _one_digit(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as ConfigError, so that a command prints one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _convert(spec: Field[Any], kind: type, value: object, where: str) -> object:
    """``value`` as the field's type; text from flags and environment is parsed."""
    name = f"{where} {spec.name}"
    if isinstance(value, str):
        (check_path if kind is Path else check_text)(value, name)
    try:
        if spec.metadata.get("size"):
            return parse_size(value)  # type: ignore[arg-type]
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and where != "key":
            return _BOOLS[value.lower()] if kind is bool else kind(value)
    except (ConfigError, ValueError, KeyError) as error:
        detail = str(error) if isinstance(error, ConfigError) else _EXPECTED[kind]
        raise ConfigError(f"{name}: {value!r}: {detail}") from None
    raise ConfigError(f"{name}: {value!r} is of type {type(value).__name__}, not {kind.__name__}")


def _read_toml(path: Path, known: Sequence[str]) -> dict[str, object]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: {error}") from None
    if unknown := sorted(set(table) - set(known)):
        raise ConfigError(
            f"config file {path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
    return table


def build_config(
    cls: type[ConfigT],
    *,
    file: Path | None = None,
    env_prefix: str = "",
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str | None] | None = None,
) -> ConfigT:
    """The configuration from a TOML file, overridden by ``{env_prefix}NAME``, then by flags.

    Raises ConfigError for an unknown key, a wrong type, or a required field without a value.
    """
    hints = get_type_hints(cls)
    specs = {spec.name: spec for spec in fields(cls)}
    values: dict[str, object] = {}
    if file is not None:
        for name, raw in _read_toml(file, list(specs)).items():
            values[name] = _convert(specs[name], hints[name], raw, "key")
    for key, raw in (environ or {}).items():
        name = key.removeprefix(env_prefix).lower()
        if env_prefix and key.startswith(env_prefix):
            if name not in specs:
                raise ConfigError(f"environment variable {key}: no such setting")
            values[name] = _convert(specs[name], hints[name], raw, "environment variable for")
    for name, flag in (flags or {}).items():
        if flag is not None:
            values[name] = _convert(specs[name], hints[name], flag, "flag for")
    for name, spec in specs.items():
        if name not in values and spec.default is MISSING:
            raise ConfigError(f"{name} is not set: pass --{name.replace('_', '-')}")
    return cls(**values)


def _default_text(spec: Field[Any]) -> str:
    default: Any = spec.default
    return format_size(default) if spec.metadata.get("size") else str(default)


def parse_command_line(
    cls: type[ConfigT],
    *,
    prog: str,
    description: str,
    env_prefix: str,
    argv: Sequence[str] | None,
    environ: Mapping[str, str],
) -> ConfigT:
    """The configuration that ``argv`` asks for: ``--config FILE`` and one flag for each field.

    Raises ConfigError; ``--help`` exits with 0 as usual.
    """
    hints = get_type_hints(cls)
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{prog} {kvstore.__version__}")
    parser.add_argument("--config", metavar="FILE", help="TOML file with the settings below")
    for spec in fields(cls):
        default = "" if spec.default in (MISSING, "") else f" [{_default_text(spec)}]"
        text = (spec.metadata.get("text", "") + default).replace("%", "%%")
        flag = "--" + spec.name.replace("_", "-")
        if hints[spec.name] is bool:
            parser.add_argument(flag, nargs="?", const="true", metavar="BOOL", help=text)
        else:
            parser.add_argument(flag, metavar=spec.name.upper(), help=text)
    flags = vars(parser.parse_args(argv))
    file = flags.pop("config")
    return build_config(
        cls,
        file=Path(file) if file else None,
        env_prefix=env_prefix,
        environ=environ,
        flags=flags,
    )
