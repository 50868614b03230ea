"""Reading the JSON files of a Hugging Face directory; needs no torch."""

from collections.abc import Mapping
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from kvstore_engine.model_source import ModelLoadError

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}
_NAME_CHARS_MAX = 200


def check_directory(path: Path) -> None:
    """ModelLoadError for a directory whose config.json is broken or of an unknown architecture."""
    directory_architecture(read_json(path / "config.json"), path)


def directory_architecture(config: Mapping[str, Any], path: Path) -> str:
    """The architecture that the ``config`` of the directory ``path`` names."""
    named = config.get("architectures") or []
    for name in named if isinstance(named, list) else []:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    raise ModelLoadError(
        f"{path}: architectures {named} are not supported; known are {', '.join(_ARCHITECTURES)}"
    )


def printable(name: object) -> str:
    """A model's name from its files, fit to be shown; empty where there is none."""
    text = name if isinstance(name, str) else ""
    return "".join(character for character in text if character.isprintable())[:_NAME_CHARS_MAX]


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
    """Ids of the tokens that end a text: of ``config``, generation_config.json, the tokenizer."""
    ids: list[int] = []
    for source in (config, read_json_if_there(directory / "generation_config.json")):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    named = _named_end_token(directory)
    ids += [] if named is None else [named]
    return tuple(dict.fromkeys(ids))


def token_name(entry: Any) -> str:
    """A token is named by a string, or by an object with its ``content``."""
    value = entry.get("content") if isinstance(entry, Mapping) else entry
    return value if isinstance(value, str) else ""


def _named_end_token(directory: Path) -> int | None:
    """The end token of tokenizer_config.json: what a chat model was trained to end its turn with,
    where config.json still has the one of its base model.
    """
    settings = read_json_if_there(directory / "tokenizer_config.json")
    name = token_name(settings.get("eos_token"))
    if not name:
        return None
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        if token_name(entry) == name and str(number).isdecimal():
            return int(number)
    tokenizer = read_json_if_there(directory / "tokenizer.json")
    for entry in tokenizer.get("added_tokens") or ():
        if token_name(entry) == name:
            return int(entry["id"])
    vocab = (tokenizer.get("model") or {}).get("vocab")
    return vocab.get(name) if isinstance(vocab, dict) else None
