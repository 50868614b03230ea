"""What is refused says what to do, in words that hold for the command that was typed."""

import asyncio
import os
import socket
import sys
from pathlib import Path

import pytest
from kvstore.cli.main import main
from kvstore.core.keys import block_keys, join_keys, namespace_root
from kvstore.core.spec import CacheSpec

from tests.cli.store import short_directory
from tests.master.rig import DRAM, SPEC, Master, until
from tests.node.rig import LocalNode

NOBODY = 65534


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """What the command says on stderr, ending with this code."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    return " ".join(err.replace("│", " ").split())


def test_up_names_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with short_directory() as folder, socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        where = ("up", "--data-dir", str(folder), "--master-listen")
        for arguments, says in (
            (("0.0.0.0:0",), "or pass --insecure"),
            ((port,), "stop what listens there (another kvstore?), or take another --master-lis"),
            (("127.0.0.1:0", "--master-metrics-listen", port), "another --master-metrics-listen"),
            (("127.0.0.1:0", "--metrics-listen", port), "or take another --metrics-listen"),
            (("127.0.0.1:0", "--listen", f"unix:/tmp/{'x' * 120}"), "such as --listen unix:/run"),
        ):
            assert says in refused(capsys, 2, *where, *arguments)


def test_up_has_the_flags_that_remedies_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["up", "--help"])
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--insecure", "--ssd-dir", "--ssd", "--pool-dir"))


async def test_a_node_is_no_master(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    node = LocalNode(tmp_path)
    await node.start()
    try:
        call = (capsys, 1, "status", "--master", node.config.address)
        assert "is a node, not a master" in await asyncio.to_thread(refused, *call)
    finally:
        await node.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_socket_of_another_user(capsys: pytest.CaptureFixture[str]) -> None:
    with short_directory() as folder, socket.socket(socket.AF_UNIX) as server:
        folder.chmod(0o755)
        server.bind(str(folder / "s"))
        server.listen()
        (folder / "s").chmod(0o600)
        os.seteuid(NOBODY)
        try:
            says = refused(capsys, 1, "status", "--master", f"unix:{folder}/s")
        finally:
            os.seteuid(0)
    assert "belongs to another user" in says


@pytest.mark.parametrize("given", ["1,x", "1.5", "0x1"])
def test_what_is_no_token(capsys: pytest.CaptureFixture[str], given: str) -> None:
    says = refused(capsys, 2, "locate", "--tokens", given)
    assert "token ids are whole numbers" in says
    assert "literal" not in says


@pytest.mark.parametrize(
    "module", ["kvstore.cli.main", "kvstore.node.daemon", "kvstore.master.daemon"]
)
def test_version(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    __import__(module)
    with pytest.raises(SystemExit) as ended:
        sys.modules[module].main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out.split()[1] == "0.1.0"


async def test_a_text_is_of_a_model(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = pytest.importorskip("kvstore_engine.tokenizer").load_tokenizer("tiny-random")
    model = CacheSpec.gqa(
        model="tiny-random",
        weights_fingerprint="f",
        kv_dtype="float32",
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        rope="r",
        block_tokens=4,
    )
    text = "a prompt of some length"
    node = await master.ready_node()
    for spec in (SPEC, model):
        await node.namespace(spec)
        chain = block_keys(namespace_root(spec), tokenizer.encode(text), 4)
        await node.delta(DRAM, root=namespace_root(spec), stored=join_keys(chain[:2]))
    await until(lambda: master.cluster.locations.entries == 4)

    def located() -> None:
        main(["locate", "--text", text, "--tokenizer", "tiny-random", "--master", master.address])

    with pytest.raises(SystemExit) as ended:
        await asyncio.to_thread(located)
    assert not ended.value.code
    assert "2 leading blocks" in capsys.readouterr().out
