"""Reading the JSON files of a Hugging Face directory; needs no torch."""

from collections.abc import Mapping
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from kvstore_engine.model_source import ModelLoadError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelLoadError when it is none."""
    try:
        value = loads(path.read_text(encoding="utf-8"))
    except (OSError, JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds no JSON object")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As read_json(), but empty for a file that does not exist."""
    return read_json(path) if path.is_file() else {}


def end_tokens(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the tokens that end a text, by ``config`` and by generation_config.json."""
    ids: list[int] = []
    for source in (config, read_json_if_there(directory / "generation_config.json")):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))
