"""The real kvstore-master process: start, answers, kill -9, bad configuration."""

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvstore_proto import admin_pb2, admin_pb2_grpc, master_pb2, master_pb2_grpc

READY = "kvstore-master ready: "


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvstore.master.daemon", *arguments]


@contextlib.contextmanager
def daemon(data_dir: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running master and its address; ended at the end."""
    process = subprocess.Popen(
        command("--data-dir", str(data_dir), "--listen", "127.0.0.1:0", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(READY):
                assert process.stderr is not None
                pytest.fail(f"{line!r} {process.stderr.read()}")
            yield process, line.removeprefix(READY).strip()
        finally:
            process.kill()


def hello(address: str) -> master_pb2.MasterWelcome:
    """What a node hears when it joins."""
    report = master_pb2.NodeReport(
        hello=master_pb2.NodeHello(protocol_version=1, node_id="node-a", hostname="host")
    )
    with grpc.insecure_channel(address) as channel:
        call = master_pb2_grpc.MasterStub(channel).Session(iter([report]), timeout=20)
        return next(iter(call)).welcome


def test_I8_a_killed_master_comes_back_with_a_newer_epoch(tmp_path: Path) -> None:
    with daemon(tmp_path, "--metrics-listen", "") as (process, address):
        assert hello(address).cluster_epoch == 1
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    with daemon(tmp_path, "--metrics-listen", "") as (process, address):
        with grpc.insecure_channel(address) as channel:
            nodes = admin_pb2_grpc.AdminStub(channel).ListNodes(
                admin_pb2.ListNodesRequest(), timeout=20
            )
            assert [(n.node_id, n.state) for n in nodes.nodes] == [("node-a", "lost")]
        assert hello(address).cluster_epoch == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_health_and_metrics_answer(tmp_path: Path) -> None:
    socket = f"unix:{tmp_path}/master.sock"
    config = tmp_path / "master.toml"
    config.write_text(f'listen = "{socket}"\nmetrics_listen = "127.0.0.1:0"\nlog_level = "debug"\n')
    process = subprocess.Popen(
        command("--config", str(config), "--data-dir", str(tmp_path / "data")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == f"{READY}{socket}\n"
            with grpc.insecure_channel(socket) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(service="kvstore.v1.Admin"), timeout=20
                )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            url = next(line for line in process.stderr if "metrics" in line).split()[-1]
            with urllib.request.urlopen(url, timeout=20) as page:
                assert b"kvstore_master_nodes" in page.read()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "/nowhere.toml"], "config file /nowhere.toml"),
        (["--listen", "0.0.0.0:0"], "--insecure"),
        (["--listen", "nonsense"], "write it like 127.0.0.1:9400"),
        (["--heartbeat-ms", "soon"], "flag for heartbeat_ms"),
        (["--unheard-of", "1"], "unrecognized arguments"),
        (["--data-dir", "/proc/nothing"], "data_dir /proc/nothing"),
        (["--log-level", "loud"], "log_level 'loud'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_configuration_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    defaults = ["--data-dir", str(tmp_path), "--metrics-listen", "", "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        command(*defaults, *arguments),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("kvstore-master: ")


def test_a_port_in_use_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with daemon(tmp_path / "a", "--metrics-listen", "") as (_, address):
        done = subprocess.run(
            command("--data-dir", str(tmp_path / "b"), "--listen", address, "--metrics-listen", ""),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"cannot listen on {address}" in done.stderr
