"""Every command against a real master and fake nodes: what people and programs see."""

import asyncio
import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from kvstore.cli.main import main
from kvstore.core.keys import block_keys, join_keys, namespace_root
from kvstore.core.spec import CacheSpec

from tests.master.rig import DRAM, HBM, ROOT, SPEC, FakeNode, Master, keys, until

OTHER = CacheSpec.raw("other", block_bytes=64, block_tokens=4)
TOKENS = ",".join(map(str, range(18)))
Output = tuple[int, str, str]


@pytest.fixture
def cli(master: Master, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command on another thread: exit code, stdout, stderr."""

    def run(arguments: tuple[str, ...]) -> Output:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--master", master.address])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    async def call(*arguments: str) -> Output:
        return await asyncio.to_thread(run, arguments)

    return call


async def stocked(master: Master, node_id: str = "node-a") -> FakeNode:
    """A node with three blocks of a prompt on SSD, two in DRAM, one in an engine's pages."""
    chain = block_keys(ROOT, range(18), SPEC.block_tokens)
    node = await master.ready_node(node_id, dram=join_keys(chain[:2]), ssd=join_keys(chain[:3]))
    await node.delta(HBM, stored=chain[0], engine_id="engine-1")
    await node.heartbeat(
        capacity_bytes=1 << 20,
        free_bytes=900_000,
        live_bytes=100_000,
        pending_bytes=48_576,
        blocks=2,
    )
    await until(lambda: bool(master.cluster.members.nodes[node_id].tiers))
    return node


async def test_status(master: Master, cli: Callable[..., Any]) -> None:
    code, out, _ = await cli("status")
    assert code == 0
    assert "0 nodes ready; 0 blocks indexed (copies in all tiers: 0)" in out
    await stocked(master)
    _, out, _ = await cli("status")
    assert "1 node ready; 3 blocks indexed (copies in all tiers: 6)" in out
    assert "97.7 KiB" in out
    assert ROOT.hex()[:12] in out
    code, out, _ = await cli("status", "--json")
    status = json.loads(out)
    assert (status["nodes_ready"], status["nodes_lost"], status["indexed_blocks"]) == (1, 0, 6)
    [hbm, dram] = status["tiers"]
    assert (hbm["tier"], hbm["capacity_bytes"], hbm["blocks"]) == ("HBM", 0, 1)
    assert [dram] == [
        {
            "tier": "DRAM",
            "capacity_bytes": 1 << 20,
            "free_bytes": 900_000,
            "live_bytes": 100_000,
            "pending_bytes": 48_576,
            "quarantined_bytes": 0,
            "blocks": 2,
        }
    ]
    [namespace] = status["namespaces"]
    assert (namespace["root"], namespace["blocks"]) == (ROOT.hex(), 3)
    assert namespace["spec"]["block_bytes"] == 4096


async def test_nodes(master: Master, cli: Callable[..., Any]) -> None:
    assert "No node has joined" in (await cli("nodes"))[1]
    await stocked(master)
    (await master.node("node-b")).drop()
    await until(lambda: master.cluster.members.nodes["node-b"].state.value == "lost")
    _, out, _ = await cli("nodes")
    assert [line.split()[:3] for line in out.splitlines() if "node-" in line] == [
        ["node-a", "ready", "now"],
        ["node-b", "lost", "0"],  # s ago
    ]
    assert "14 % of 1 MiB" in out
    listed = json.loads((await cli("nodes", "--json"))[1])["nodes"]
    assert [(n["node_id"], n["state"], n["sessions"]) for n in listed] == [
        ("node-a", "ready", 3),
        ("node-b", "lost", 0),
    ]
    assert "1 lost" in (await cli("status"))[1]


async def test_a_lost_node_can_be_forgotten(master: Master, cli: Callable[..., Any]) -> None:
    node = await master.ready_node("node-b")
    code, _, err = await cli("nodes", "--forget", "node-b")
    assert code == 1
    assert err.startswith("kvstore: node 'node-b' is connected (ready): stop it first")
    node.drop()
    await until(lambda: master.cluster.members.nodes["node-b"].state.value == "lost")
    assert await cli("nodes", "--forget", "node-b") == (0, "Forgot node-b.\n", "")
    assert json.loads((await cli("nodes", "--json"))[1]) == {"nodes": []}
    code, _, err = await cli("nodes", "--forget", "node-b")
    assert (code, err) == (1, "kvstore: no node 'node-b'; `kvstore nodes` lists them\n")


async def test_an_address_is_never_cut_or_folded(
    master: Master, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "node-" + "x" * 30
    await master.node(name)
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = await cli("nodes")
    assert f"{name}  host unix:/{name}" in out.splitlines()
    monkeypatch.setenv("COLUMNS", "160")
    _, out, _ = await cli("nodes")
    [line] = [line for line in out.splitlines() if name in line]
    assert line.endswith(f"host unix:/{name}")


async def test_blocks(master: Master, cli: Callable[..., Any]) -> None:
    assert "No such block" in (await cli("blocks"))[1]
    await stocked(master)
    _, out, _ = await cli("blocks", "--limit", "4")
    more = shlex.split(out.partition("There is more: ")[2])
    assert more[:4] == ["kvstore", "blocks", "--limit", "4"]
    assert more[4:7] == ["--master", master.address, "--after"]
    _, rest, _ = await cli(*more[1:])
    assert out.count("node-a") + rest.count("node-a") == 6
    filters = ("--namespace", ROOT.hex()[:6], "--node", "node-a", "--tier", "ssd", "--limit", "2")
    _, out, _ = await cli("blocks", *filters)
    more = shlex.split(out.partition("There is more: ")[2])
    assert more[2:10] == list(filters)
    _, rest, _ = await cli(*more[1:])
    assert (rest.count("SSD"), rest.count("DRAM"), "more" in rest) == (1, 0, False)
    _, out, _ = await cli("blocks", "--tier", "hbm", "--node", "node-a", "--json")
    [block] = json.loads(out)["blocks"]
    assert (block["tier"], block["engine_id"], block["bytes"]) == ("HBM", "engine-1", 4096)
    _, out, _ = await cli("blocks", "--namespace", ROOT.hex()[:6], "--json")
    assert len(json.loads(out)["blocks"]) == 6


@pytest.mark.parametrize("columns", [80, 60])
async def test_tables_fit_the_terminal(
    master: Master, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    node = await stocked(master, "node-1a2b3c4d5e6f")
    await node.delta(HBM, stored=keys(1), engine_id="0123456789abcdef" * 2)
    await node.heartbeat(
        capacity_bytes=3456 << 20,
        free_bytes=1234 << 20,
        live_bytes=1234 << 20,
        pending_bytes=765 << 20,
        quarantined_bytes=223 << 20,
        blocks=12345,
    )
    node_info = master.cluster.members.nodes["node-1a2b3c4d5e6f"]
    await until(lambda: node_info.tiers[0].blocks == 12345)
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = await cli("blocks")
    assert [out.count(tier) for tier in ("HBM", "DRAM", "SSD")] == [2, 2, 3]
    assert "01234567 " in out
    for command in (["status"], ["nodes"], ["blocks"], ["locate", "--tokens", TOKENS]):
        _, out, _ = await cli(*command)
        assert max(map(len, out.splitlines())) <= columns
        assert "…" not in out
        headers = {"nodes": "node state seen DRAM SSD", "blocks": "key tier node engine"}
        headers |= {"status": "tier capacity", "locate": "tier node engine blocks from to"}
        assert headers[command[0]] in " ".join(out.split())
        assert command[0] == "status" or "node-1a2b3c4d5e6f" in out
    assert ("░" in out) == (columns == 80)


async def test_locate(master: Master, cli: Callable[..., Any]) -> None:
    await stocked(master)
    _, out, _ = await cli("locate", "--tokens", TOKENS)
    assert "18 tokens: 4 blocks of 4 and 2 tokens that fill none" in out
    assert "3 leading blocks cached (12 tokens, 67 % of the prompt)" in out
    assert "█" in out
    _, out, _ = await cli("locate", "--tokens", TOKENS.replace(",", " "), "--json")
    located = json.loads(out)
    assert (located["blocks"], located["found"], located["found_tokens"]) == (4, 3, 12)
    assert [(r["tier"], r["first"], r["count"]) for r in located["runs"]] == [
        ("HBM", 0, 1),
        ("DRAM", 0, 2),
        ("SSD", 0, 3),
    ]
    _, out, _ = await cli("locate", "--tokens", TOKENS, "--salt", "x")
    assert "0 leading blocks cached" in out


async def test_locate_by_text(master: Master, cli: Callable[..., Any]) -> None:
    tokenizer = pytest.importorskip("kvstore_engine.tokenizer").load_tokenizer("tiny-random")
    text = "a prompt of some length"
    chain = block_keys(ROOT, tokenizer.encode(text), SPEC.block_tokens)
    await master.ready_node(dram=join_keys(chain[:3]))
    _, out, _ = await cli("locate", "--text", text, "--tokenizer", "tiny-random", "--json")
    assert json.loads(out)["found"] == 3
    code, _, err = await cli("locate", "--text", text, "--tokenizer", "/nowhere")
    assert code == 2
    assert err.startswith("kvstore: --tokenizer: ")


async def test_a_prompt_may_come_from_stdin(
    master: Master, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    await stocked(master)

    class Stdin:
        def read(self) -> str:
            return TOKENS + "\n"

    monkeypatch.setattr("sys.stdin", Stdin())
    assert json.loads((await cli("locate", "--tokens", "-", "--json"))[1])["found"] == 3


async def test_evict(master: Master, cli: Callable[..., Any]) -> None:
    node = await stocked(master)
    call = asyncio.ensure_future(cli("evict", "--tier", "dram", "--bytes", "1MiB", "--drop"))
    order = (await node.answer(blocks=2, bytes=8192, pinned=1)).evict
    assert (order.tier, order.bytes, order.drop, order.keys) == (DRAM, 1 << 20, True, b"")
    code, out, _ = await call
    assert (code, out) == (0, "Evicted 2 blocks (8 KiB) on 1 node. 1 block in use stayed.\n")
    call = asyncio.ensure_future(cli("evict", "--tier", "DRAM"))
    assert not (await node.answer()).evict.drop
    assert "Blocks that are not on SSD yet stay until they are; --drop" in (await call)[1]
    call = asyncio.ensure_future(cli("evict", "--tier", "ssd"))
    await node.answer()
    assert "Blocks without another copy stay; --drop evicts them." in (await call)[1]
    call = asyncio.ensure_future(cli("evict", "--tier", "dram"))
    await node.answer(pinned=1)
    assert (await call)[1] == "Evicted 0 blocks (0 B) on 1 node. 1 block in use stayed.\n"
    call = asyncio.ensure_future(
        cli("evict", "--tier", "ssd", "--keys", keys(1).hex(), "--json", "--node", "node-a")
    )
    assert (await node.answer(error="disk on fire")).evict.keys == keys(1)
    code, out, _ = await call
    assert code == 1
    assert json.loads(out) == {
        "blocks": 0,
        "bytes": 0,
        "pinned": 0,
        "nodes": 0,
        "errors": ["node-a: disk on fire"],
    }


async def test_purge(
    master: Master, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await stocked(master)
    call = asyncio.ensure_future(cli("purge", "--namespace", ROOT.hex()[:8], "--yes"))
    assert (await node.answer(blocks=3, bytes=12288)).purge.root == ROOT
    assert (await call)[1] == "Purged 3 blocks (12 KiB) on 1 node.\n"
    call = asyncio.ensure_future(cli("purge", "--all", "-y"))
    await node.answer(error="no")
    code, _, err = await call
    assert (code, err) == (1, "node-a: no\n")
    code, _, err = await cli("purge", "--all")
    assert code == 2
    assert "--yes" in err


@pytest.mark.parametrize("agreed", [True, False])
async def test_purge_asks_on_a_terminal(
    master: Master, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, agreed: bool
) -> None:
    node = await stocked(master)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    asked = []

    def confirm(text: str, *, abort: bool, err: bool) -> None:
        asked.append(text)
        if not agreed:
            raise SystemExit(1)

    monkeypatch.setattr("typer.confirm", confirm)
    call = asyncio.ensure_future(cli("purge", "--all"))
    if agreed:
        await node.answer(blocks=3)
    code, _, err = await call
    assert code == (0 if agreed else 1)
    assert f"{ROOT.hex()[:12]} (tests): 3 blocks" in err
    assert asked == ["Forget them in every tier?"]


async def test_version(
    master: Master, cli: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = await cli("version")
    assert out.startswith("kvstore 0.1.0\nmaster  0.1.0 (protocol 1) at ")
    _, out, _ = await cli("version", "--json")
    assert json.loads(out)["master"] == {"version": "0.1.0", "protocol_version": 1}
    for arguments in (["version"], ["version", "--json"]):
        with pytest.raises(SystemExit) as ended:
            await asyncio.to_thread(main, [*arguments, "--master", "127.0.0.1:1"])
        assert not ended.value.code
    assert '"master": null' in capsys.readouterr().out


async def test_a_namespace_is_named_by_its_first_digits(
    master: Master, cli: Callable[..., Any]
) -> None:
    node = await stocked(master)
    await node.namespace(OTHER)
    await until(lambda: len(master.cluster.namespaces) == 2)
    assert "3 leading blocks" in (await cli("locate", "--tokens", TOKENS))[1]
    await node.delta(DRAM, root=namespace_root(OTHER), stored=keys(1))
    await until(lambda: master.cluster.locations.entries == 7)
    code, _, err = await cli("locate", "--tokens", TOKENS)
    assert code == 2
    assert "several namespaces" in err
    assert f"{ROOT.hex()[:12]} ({SPEC.model})" in err
    code, out, _ = await cli("locate", "--tokens", TOKENS, "--namespace", ROOT.hex()[:10])
    assert (code, "3 leading blocks" in out) == (0, True)
    other = namespace_root(OTHER).hex()
    code, _, err = await cli("blocks", "--namespace", other + "0")
    assert (code, "no namespace begins with" in err) == (1, True)
    code, _, err = await cli("blocks", "--namespace", "xyz")
    assert (code, "hex digits" in err) == (2, True)


async def test_an_ambiguous_namespace_asks_for_more_digits(
    master: Master, cli: Callable[..., Any]
) -> None:
    node = await stocked(master)
    specs = [CacheSpec.raw(f"n{i}", block_bytes=64) for i in range(40)]
    first = namespace_root(specs[0]).hex()[0]
    twin = next(s for s in specs[1:] if namespace_root(s).hex()[0] == first)
    await node.namespace(specs[0])
    await node.namespace(twin)
    await until(lambda: len(master.cluster.namespaces) == 3)
    code, _, err = await cli("blocks", "--namespace", first)
    assert (code, "give more digits" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["locate"], "--tokens or as --text"),
        (["locate", "--tokens", "1", "--text", "x"], "--tokens or as --text"),
        (["locate", "--text", "x"], "--text needs --tokenizer"),
        (["locate", "--tokens", "1,zwei"], "token ids are whole numbers"),
        (["locate", "--tokens", "-1,2"], "a token id is 0 to"),
        (["evict"], "--tier"),
        (["evict", "--tier", "hbm"], "dram"),
        (["evict", "--tier", "dram", "--bytes", "lots"], "is not understood"),
        (["evict", "--tier", "dram", "--keys", "zz"], "hex digits"),
        (["evict", "--tier", "dram", "--keys", "abcd"], "64 hex digits"),
        (["purge"], "--all"),
        (["purge", "--namespace", "ab", "--all"], "--all"),
        (["blocks", "--limit", "0"], "--limit"),
        (["blocks", "--after", "12"], "64 hex digits"),
        (["up", "--dram", "plenty"], "is not understood"),
        (["nonsense"], "nonsense"),
        (["status", "--nonsense"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["nodes"], ["blocks"], ["locate", "--tokens", "1"], ["evict", "--tier", "ssd"]],
    ids=lambda value: value[0],
)
def test_a_master_that_is_away_is_one_line_and_exit_code_1(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--master", "127.0.0.1:1"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "kvstore: no master answers at 127.0.0.1:1; start one with `kvstore up`, or name it with "
        "--master or KVSTORE_MASTER\n"
    )


@pytest.mark.parametrize(
    "command", ["up", "status", "nodes", "blocks", "locate", "evict", "purge", "fsck", "version"]
)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    assert f"kvstore {command}" in text.split("Examples")[1]
    assert "--json" in text
