"""The real engine, connector, client and node: whatever the store does, the tokens are the same."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.connector.daemons import PAGE_TOKENS, Answer, EngineRig, NodeProcess, flip_bytes

BLOCKS = 20
PROMPT = [(i * i + 3 * i) % 255 for i in range(BLOCKS * PAGE_TOKENS + 5)]


@pytest.fixture(scope="module")
def expected() -> Answer:
    """What the engine says without a store."""
    rig = EngineRig(None)
    (answer,) = rig.ask(PROMPT)
    rig.close()
    return answer


@pytest.fixture
def start_node() -> Iterator[Callable[..., NodeProcess]]:
    """Starts nodes; ends them after the test."""
    nodes: list[NodeProcess] = []

    def start(**options: str) -> NodeProcess:
        nodes.append(NodeProcess(**options))
        return nodes[-1]

    yield start
    for node in nodes:
        node.close()


@pytest.fixture
def start_engine() -> Iterator[Callable[..., EngineRig]]:
    """Starts engines; ends them after the test."""
    rigs: list[EngineRig] = []

    def start(node: NodeProcess, **extra: object) -> EngineRig:
        rigs.append(EngineRig(node.address, **extra))
        return rigs[-1]

    yield start
    for rig in rigs:
        rig.close()


def size_of(path: Path) -> int:
    """Bytes of a file; of anything else, none."""
    return path.stat().st_size if path.is_file() else 0


Start = Callable[..., NodeProcess]
StartEngine = Callable[..., EngineRig]


def test_I12_a_fresh_engine_loads_what_another_computed(
    start_node: Start, start_engine: StartEngine, expected: Answer
) -> None:
    node = start_node()
    first = start_engine(node)
    (cold,) = first.ask(PROMPT)
    assert cold.tokens == expected.tokens
    assert (cold.usage.total, cold.usage.end_reason) == (0, "never_stored")
    first.saved(BLOCKS)
    second = start_engine(node)
    (warm,) = second.ask(PROMPT)
    assert warm.tokens == expected.tokens
    assert warm.usage.dram == BLOCKS * PAGE_TOKENS
    assert warm.usage.hbm == warm.usage.ssd == 0
    (hot,) = second.ask(PROMPT)
    assert hot.tokens == expected.tokens
    assert hot.usage.hbm == BLOCKS * PAGE_TOKENS


def test_I12_many_prompts_at_once_share_their_prefixes(
    start_node: Start, start_engine: StartEngine
) -> None:
    prompts = [PROMPT[: 3 * PAGE_TOKENS * n] + [n] * 40 for n in range(1, 6)]
    plain = EngineRig(None)
    wanted = [answer.tokens for answer in plain.ask(*prompts)]
    plain.close()
    node = start_node()
    assert [answer.tokens for answer in start_engine(node).ask(*prompts)] == wanted
    assert [answer.tokens for answer in start_engine(node).ask(*prompts)] == wanted


def test_I9_node_killed_engine_goes_on_and_comes_back(
    start_node: Start, start_engine: StartEngine, expected: Answer
) -> None:
    node = start_node()
    rig = start_engine(node)
    name = rig.submit(PROMPT)
    rig.step()
    node.signal(signal.SIGKILL)
    (answer,) = rig.finish(name)
    assert answer.tokens == expected.tokens
    node.start()
    rig.connected()
    rig.engine.reset_cache()
    assert rig.ask(PROMPT)[0].tokens == expected.tokens
    rig.saved(BLOCKS)
    (warm,) = start_engine(node).ask(PROMPT)
    assert warm.tokens == expected.tokens
    assert warm.usage.dram == BLOCKS * PAGE_TOKENS


def test_I9_node_killed_before_a_load_ends(
    start_node: Start, start_engine: StartEngine, expected: Answer
) -> None:
    node = start_node()
    first = start_engine(node)
    first.ask(PROMPT)
    first.saved(BLOCKS)
    second = start_engine(node, load_timeout_s=1.0)
    node.signal(signal.SIGSTOP)
    name = second.submit(PROMPT)
    second.step()
    node.signal(signal.SIGKILL)
    (answer,) = second.finish(name)
    assert answer.tokens == expected.tokens
    assert answer.usage.total == 0


def test_I9_a_stopped_node_costs_one_deadline(
    start_node: Start, start_engine: StartEngine, expected: Answer
) -> None:
    node = start_node()
    first = start_engine(node)
    first.ask(PROMPT)
    first.saved(BLOCKS)
    rig = start_engine(node, load_timeout_s=0.5)
    node.signal(signal.SIGSTOP)
    started_s = time.monotonic()
    (slow,) = rig.ask(PROMPT)
    assert slow.tokens == expected.tokens
    assert (slow.usage.total, slow.usage.end_reason) == (0, "timed_out")
    rig.engine.reset_cache()
    (away,) = rig.ask(PROMPT)
    assert away.tokens == expected.tokens
    assert away.usage.end_reason == "store_unavailable"
    assert time.monotonic() - started_s < 5
    node.signal(signal.SIGCONT)
    rig.connected()
    rig.engine.reset_cache()
    (healed,) = rig.ask(PROMPT)
    assert healed.tokens == expected.tokens
    assert healed.usage.dram == BLOCKS * PAGE_TOKENS


def test_a_restarted_node_serves_from_its_ssd(
    start_node: Start, start_engine: StartEngine, expected: Answer
) -> None:
    node = start_node(ssd="32MiB")
    first = start_engine(node)
    first.ask(PROMPT)
    first.saved(BLOCKS)
    node.stop()
    node.start()
    (warm,) = start_engine(node).ask(PROMPT)
    assert warm.tokens == expected.tokens
    assert warm.usage.ssd == BLOCKS * PAGE_TOKENS


def test_I1_corrupt_blocks_are_computed_again(
    start_node: Start, start_engine: StartEngine, expected: Answer
) -> None:
    node = start_node(ssd="32MiB")
    first = start_engine(node)
    first.ask(PROMPT)
    first.saved(BLOCKS)
    node.stop()
    flip_bytes(max(node.home.rglob("*"), key=size_of))
    node.start()
    (warm,) = start_engine(node).ask(PROMPT)
    assert warm.tokens == expected.tokens
    assert (warm.usage.total, warm.usage.end_reason) == (0, "corrupt")
