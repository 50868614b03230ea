"""What is wrong with a node that goes on is seen at a glance."""

import asyncio
import json

import pytest
from kvstore.cli.main import main
from kvstore_proto import common_pb2, master_pb2

from tests.master.rig import Master, until

PROBLEM = "SSD takes no more writes (fdatasync: [Errno 5]); restart the node"


async def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    def call() -> None:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code

    await asyncio.to_thread(call)
    return capsys.readouterr().out


async def test_ssd_admission_is_shown_where_it_is_not_the_default(
    master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    node = await master.ready_node()
    nodes = master.cluster.members.nodes
    where = ("--master", master.address)
    for policy, shown in (("always", False), ("second-use", True)):
        usage = common_pb2.TierUsage(tier=common_pb2.TIER_SSD, capacity_bytes=1, free_bytes=1)
        beat = master_pb2.Heartbeat(tiers=[usage], ssd_admission=policy)
        await node.report(heartbeat=beat)
        await until(lambda expected=policy: nodes["node-a"].ssd_admission == expected)  # type: ignore[misc]
        out = await run(capsys, "status", *where)
        assert (f"SSD admission: {policy}" in out) == shown
        status = json.loads(await run(capsys, "status", "--json", *where))
        assert status["ssd_admissions"] == [policy]
        [listed] = json.loads(await run(capsys, "nodes", "--json", *where))["nodes"]
        assert listed["ssd_admission"] == policy


async def test_problems_of_nodes(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    node = await master.node("node-a")
    nodes = master.cluster.members.nodes
    many = [PROBLEM, *(f"{n} " + "x" * 5000 for n in range(20))]
    await node.report(heartbeat=master_pb2.Heartbeat(sessions=1, problems=many))
    await until(lambda: bool(nodes["node-a"].problems))
    assert len(nodes["node-a"].problems) == 8
    assert max(map(len, nodes["node-a"].problems)) == 1024
    await node.report(heartbeat=master_pb2.Heartbeat(sessions=2, problems=[PROBLEM]))
    await until(lambda: nodes["node-a"].problems == [PROBLEM])
    where = ("--master", master.address)
    assert f"! node-a: {PROBLEM}" in await run(capsys, "nodes", *where)
    [listed] = json.loads(await run(capsys, "nodes", "--json", *where))["nodes"]
    assert listed["problems"] == [PROBLEM]
    assert f"! node-a: {PROBLEM}" in await run(capsys, "status", *where)
    status = json.loads(await run(capsys, "status", "--json", *where))
    assert status["problems"] == [f"node-a: {PROBLEM}"]
    await node.report(heartbeat=master_pb2.Heartbeat(sessions=1))
    await until(lambda: not nodes["node-a"].problems)
    assert "SSD takes" not in await run(capsys, "status", *where)
    await node.report(heartbeat=master_pb2.Heartbeat(sessions=1, problems=[PROBLEM]))
    await until(lambda: bool(nodes["node-a"].problems))
    node.drop()
    await until(lambda: nodes["node-a"].state.value == "lost")
    assert "SSD takes" not in await run(capsys, "nodes", *where)
