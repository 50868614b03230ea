"""Typed access to the key-value header of a GGUF file; needs no torch."""

from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np

from kvstore_engine.model_source import ModelLoadError

_T = TypeVar("_T")


class _Reader(gguf.GGUFReader):  # type: ignore[misc]  # it has no types
    """Reads the header from a plain array: a million slices of a ``memmap`` take twice as long."""

    @property
    def data(self) -> Any:
        """The file's bytes, mapped."""
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)


def open_gguf(path: Path) -> Any:
    """A ``gguf.GGUFReader``; ModelLoadError when the file is cut short or broken."""
    try:
        return _Reader(path)
    except (ValueError, KeyError, IndexError, OverflowError, OSError, TypeError) as error:
        raise ModelLoadError(f"{path} is a broken GGUF file: {error}") from error


class GgufFields:
    """Header fields by key; ``{arch}`` in a key stands for the file's architecture."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields
        self.architecture = ""
        self.architecture = self.text("general.architecture")

    def value(self, key: str) -> Any:
        """The field's value, or None."""
        field = self._fields.get(key.replace("{arch}", self.architecture))
        return None if field is None else field.contents()

    def text(self, key: str, default: str | None = None) -> str:
        """A string field."""
        return self._typed(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer field."""
        return self._typed(key, int, default)

    def token_id(self, kind: str) -> int | None:
        """The id of the special token ``kind``: bos, eos, eot, padding."""
        value = self.integer(f"tokenizer.ggml.{kind}_token_id", -1)
        return value if value >= 0 else None

    def number(self, key: str, default: float | None = None) -> float:
        """A float field."""
        return self._typed(key, float, default)

    def _typed(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, kind):
            name = key.replace("{arch}", self.architecture)
            raise ModelLoadError(f"the GGUF header's {name} is {value!r}; need {kind.__name__}")
        return value
