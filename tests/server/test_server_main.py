"""The command: what it refuses, and how it ends."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from kvstore_engine.server.main import main

TRANSFER = {"kv_connector": "KVStoreConnector", "kv_role": "kv_both"}
START_TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    """The command sets up the root logger; later tests get theirs back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which the command exits with 2."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("kvstore-engine: ")
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["model is not set"]),
        (["--modle", "x"], ["--modle"]),
        (["--model", "tiny-random", "--port", "http"], ["port", "'http'"]),
        (["--model", "tiny-random", "--port", "70000"], ["port is 70000"]),
        (["--model", "/no/such/model"], ["no model at /no/such/model"]),
        (["--model", "tiny-random", "--host", "0.0.0.0"], ["without TLS", "--insecure"]),
        (["--model", "tiny-random", "--host", "no.such.host.invalid", "--insecure", "true"],
         ["cannot listen on no.such.host.invalid"]),
        (["--model", "tiny-random", "--log-level", "loud"], ["log_level 'loud'"]),
        (["--model", "tiny-random", "--kv-memory", "much"], ["'much'"]),
        (["--model", "tiny-random", "--dtype", "int3"], ["dtype is 'int3'"]),
        (["--model", "tiny-random", "--kv-transfer-config", "{"], ["kv-transfer-config"]),
        (["--model", "tiny-random", "--kv-transfer-config", '{"kv_conector": "x"}'],
         ["kv-transfer-config", "kv_conec"]),
        (["--config", "/no/such/file.toml"], ["/no/such/file.toml"]),
    ],
    ids=lambda value: " ".join(value)[-30:],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, *arguments)
    assert all(word in line for word in words), line


def test_a_directory_or_file_that_is_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "not a model" in refusal(capsys, "--model", str(tmp_path))
    text = tmp_path / "notes.gguf"
    text.write_text("no weights in here")
    assert "not a GGUF file" in refusal(capsys, "--model", str(text))


def test_config_file_with_an_unknown_key_or_a_wrong_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('model = "tiny-random"\nprot = 80\n')
    assert "unknown key 'prot'" in refusal(capsys, "--config", str(file))
    file.write_text('model = "tiny-random"\nport = "80"\n')
    assert "port" in refusal(capsys, "--config", str(file))


def test_port_in_use_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = refusal(capsys, "--model", "tiny-random", "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line


class Command:
    """`kvstore-engine` as a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "kvstore_engine.server.main", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_ready(self) -> str:
        """The URL that it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("kvstore-engine ready: http://"), self.process.communicate()
        return line.split()[-1]

    def engine_pid(self) -> int:
        """The engine process."""
        pid = self.process.pid
        [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    def end(self, signum: int | None = None) -> tuple[int, str]:
        """Exit code and stderr, after a signal."""
        if signum is not None:
            self.process.send_signal(signum)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Starts commands, and kills at the end what still runs."""
    commands: list[Command] = []

    def run(*arguments: str) -> Command:
        commands.append(Command(*arguments))
        return commands[-1]

    yield run
    for command in commands:
        command.process.kill()
        command.process.communicate()


def wait_gone(pid: int) -> float:
    """Seconds until a process has ended."""
    start_s = time.monotonic()
    while time.monotonic() < start_s + 10:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            state = "gone"
        if state in ("gone", "Z", "X"):
            return time.monotonic() - start_s
        time.sleep(0.01)
    raise AssertionError(f"process {pid} still runs")


def test_serves_and_stops_on_sigterm(start: Callable[..., Command]) -> None:
    command = start("--model", "tiny-random", "--served-model-name", "tiny")
    url = command.wait_ready()
    engine = command.engine_pid()
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["kvstore"]["end_reason"]
    code, err = command.end(signal.SIGTERM)
    assert code == 0, err
    assert "Traceback" not in err
    wait_gone(engine)


def test_a_second_ctrl_c_ends_it_at_once(start: Callable[..., Command]) -> None:
    command = start("--model", "tiny-random")
    url = command.wait_ready()
    engine = command.engine_pid()
    body = {"prompt": "hello", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        answer = response.iter_lines()  # held: without it the client would leave
        assert next(answer).startswith("data: ")
        command.process.send_signal(signal.SIGINT)
        assert command.process.stderr is not None
        lines = [command.process.stderr.readline()]
        while lines[-1] and "a second signal ends them at once" not in lines[-1]:
            lines.append(command.process.stderr.readline())
        assert lines[-1], lines
        code, err = command.end(signal.SIGINT)
    assert "told to stop again" in err
    assert "Traceback" not in err
    assert code == 0
    wait_gone(engine)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"architectures": ["GPT2LMHeadModel"]}', "['GPT2LMHeadModel'] are not supported"),
        ("{", "config.json cannot be read"),
    ],
    ids=["gpt2", "json"],
)
def test_a_directory_of_no_use_is_refused_for_its_real_fault(
    config: str, words: str, tmp_path: Path, start: Callable[..., Command]
) -> None:
    (tmp_path / "config.json").write_text(config)
    code, err = start("--model", str(tmp_path)).end()
    assert code == 2
    assert words in err.splitlines()[-1]


def test_engine_ends_when_the_server_is_killed(start: Callable[..., Command]) -> None:
    command = start("--model", "tiny-random")
    command.wait_ready()
    engine = command.engine_pid()
    command.end(signal.SIGKILL)
    assert wait_gone(engine) < 2


def test_server_ends_with_1_when_the_engine_is_killed(start: Callable[..., Command]) -> None:
    command = start("--model", "tiny-random")
    command.wait_ready()
    os.kill(command.engine_pid(), signal.SIGKILL)
    code, err = command.end()
    assert code == 1
    assert err.splitlines()[-1] == "kvstore-engine: the engine process ended by signal 9"
    assert "Traceback" not in err


def test_connector_that_does_not_exist(start: Callable[..., Command]) -> None:
    transfer = TRANSFER | {"kv_connector_module_path": "no.such.module"}
    command = start("--model", "tiny-random", "--kv-transfer-config", json.dumps(transfer))
    code, err = command.end()
    assert code == 2
    assert "no.such.module" in err.splitlines()[-1]
    assert "Traceback" not in err
