"""stdout as a command uses it: what it does not take ends the command, in one line."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from kvstore.errors import InvalidArgumentError, KVStoreError

EXIT_FAILED = 1


class OutputError(KVStoreError):
    """stdout does not take what is written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to stdout: {error.strerror or error}")


class _Checked:
    """A stream whose errors are OutputError, but for a closed pipe, which typer ends quietly."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _as_output_error():
            return self._stream.write(text)

    def flush(self) -> None:
        with _as_output_error():
            self._stream.flush()


@contextlib.contextmanager
def _as_output_error() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error) from None


@contextlib.contextmanager
def checked_stdout() -> Iterator[None]:
    """Raises OutputError where stdout fails, its last flush included; InvalidArgumentError where
    it is closed from the start.
    """
    stream = sys.stdout
    if stream is None:
        raise InvalidArgumentError("stdout is closed; for no output, redirect it to /dev/null")
    checked = sys.stdout = cast(TextIO, _Checked(stream))
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OutputError:
        _drop(stream)
        raise
    except BrokenPipeError:
        _drop(stream)
        raise SystemExit(EXIT_FAILED) from None
    finally:
        if sys.stdout is checked:
            sys.stdout = stream


def _drop(stream: TextIO) -> None:
    """What is still buffered goes nowhere: Python would fail on it once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
