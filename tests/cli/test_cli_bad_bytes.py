"""Arguments and input that are no text, and output that cannot be written: one line each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLI = (sys.executable, "-m", "kvstore.cli.main")
NOT_TEXT = b"a\xff"
AWAY = ("--master", "127.0.0.1:1")


def ended(
    *arguments: str | bytes, shell: str = "", given: bytes = b"", env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code, and what the one line on stderr says; ``shell`` redirects the output."""
    command: list[str | bytes] = ["sh", "-c", f'exec "$@" {shell}', "sh", *CLI, *arguments]
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
    )
    assert done.stdout == b""
    says = done.stderr.decode()
    assert says.count("\n") == 1, says
    return done.returncode, says


@pytest.mark.parametrize(
    "arguments",
    [
        ("blocks", "--node", NOT_TEXT),
        ("status", "--master", NOT_TEXT),
        ("locate", "--tokens", "1", "--salt", NOT_TEXT),
        ("nodes", "--forget", NOT_TEXT),
        ("up", "--data-dir", b"/tmp/" + NOT_TEXT),
        (NOT_TEXT,),
    ],
    ids=lambda value: value[0],
)
def test_an_argument_that_is_no_text(arguments: tuple[str | bytes, ...]) -> None:
    code, says = ended(*arguments)
    assert code == 2
    assert says.endswith("a\\xff' is not valid UTF-8; write it in UTF-8\n")


def test_a_variable_that_is_no_text() -> None:
    code, says = ended("status", env={"KVSTORE_MASTER": os.fsdecode(NOT_TEXT)})
    assert code == 2
    assert "KVSTORE_MASTER 'a\\xff' is not valid UTF-8" in says


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
@pytest.mark.parametrize("kind", ["--text", "--tokens"])
def test_a_prompt_that_is_no_text(kind: str, locale: str) -> None:
    tokenizer = ("--tokenizer", "tiny-random") if kind == "--text" else ()
    code, says = ended(
        "locate", kind, "-", *tokenizer, *AWAY, given=NOT_TEXT, env={"LC_ALL": locale}
    )
    assert code == 2
    assert "kvstore: stdin is not valid UTF-8" in says


def test_a_prompt_from_an_empty_stdin() -> None:
    """What should have made it may have failed."""
    code, says = ended("locate", "--tokens", "-", *AWAY, given=b"\n")
    assert code == 2
    assert "kvstore: stdin is empty" in says


def test_a_prompt_from_a_closed_stdin() -> None:
    code, says = ended("locate", "--tokens", "-", *AWAY, shell="<&-")
    assert code == 2
    assert "kvstore: stdin is closed" in says


def test_a_purge_with_a_closed_stdin_does_not_ask() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *CLI, "purge", "--all", *AWAY],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert b"pass --yes" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("version", *AWAY), ("version", "--json", *AWAY)]
)
def test_an_output_that_is_full(arguments: tuple[str, ...], unbuffered: str) -> None:
    code, says = ended(*arguments, shell=">/dev/full", env={"PYTHONUNBUFFERED": unbuffered})
    assert code == 1
    assert says == "kvstore: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("version", *AWAY)])
def test_an_output_that_is_closed(arguments: tuple[str, ...]) -> None:
    code, says = ended(*arguments, shell=">&-")
    assert code == 2
    assert says == "kvstore: stdout is closed; for no output, redirect it to /dev/null\n"


@pytest.mark.parametrize("arguments", [("--version",), ("version", "--json", *AWAY)])
def test_a_reader_that_is_gone_is_told_nothing(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*CLI, *arguments], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
