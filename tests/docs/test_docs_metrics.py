"""docs/metrics.md names every metric that there is with its type and labels, and none else."""

import asyncio
import re
from collections.abc import Iterable
from pathlib import Path

import kvstore.core
from kvstore.core.types import EndReason
from kvstore.node.metrics import node_registry
from kvstore_engine.messages import EngineStats
from kvstore_engine.server.counter_texts import COUNTER_TEXTS
from kvstore_engine.server.metrics import Metrics
from prometheus_client.metrics_core import Metric

from tests.docs.pages import code, page, rows, section
from tests.master.rig import start_master
from tests.node.rig import LocalNode

PAGE = page("docs/metrics.md")
Families = dict[str, tuple[str, frozenset[str]]]  # name -> type, labels
END = "kvstore_node_acquire_end_REASON_total"


def documented(title: str) -> Families:
    """The metrics of a section."""
    found: Families = {}
    for name, kind, labels, meaning in rows(section(PAGE, title)):
        (metric,) = code(name)
        assert metric not in found
        assert meaning
        found[metric] = kind, frozenset(code(labels))
    return found


def names_and_types(metrics: Iterable[Metric]) -> dict[str, str]:
    """Metrics as they are written at /metrics."""
    return {
        metric.name + ("_total" if metric.type == "counter" else ""): metric.type
        for metric in metrics
    }


def labels_of(metrics: Iterable[Metric]) -> Families:
    """Types and labels of the metrics that have a sample now."""
    return {
        name: (kind, frozenset(set().union(*(s.labels for s in metric.samples)) - {"le"}))
        for metric in metrics
        for name, kind in names_and_types([metric]).items()
        if metric.samples
    }


def test_metrics_of_the_engine() -> None:
    counters = dict.fromkeys(COUNTER_TEXTS, 1.0)
    metrics = Metrics(lambda: EngineStats(0, 0, 0, 0, 0, counters, {}))
    metrics.responded("/health", 200)
    metrics.finished("stop")
    families = list(metrics.registry.collect())
    page_says = documented("Engine")
    assert {name: kind for name, (kind, _) in page_says.items()} == names_and_types(families)
    seen = labels_of(families)
    assert {name: page_says[name] for name in seen} == seen


def counted_by_the_core() -> list[str]:
    """A node's counters appear with their first event; these are in the source."""
    folder = Path(kvstore.core.__path__[0])
    source = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return re.findall(r'\.count\(\s*f?"([^"]+)"', source)


async def test_metrics_of_the_node(tmp_path: Path) -> None:
    node = LocalNode(tmp_path)
    await node.start()
    try:
        registry = node_registry(node.node)
        families = await asyncio.to_thread(lambda: list(registry.collect()))
    finally:
        await node.stop()
    names = names_and_types(families)
    for name in counted_by_the_core():
        names[f"kvstore_node_{name}_total"] = "counter"
    names[END] = names.pop("kvstore_node_acquire_end_{reason.name.lower()}_total")
    for reason in EndReason:
        names.pop(END.replace("REASON", reason.name.lower()), None)
    page_says = documented("Node")
    assert {name: kind for name, (kind, _) in page_says.items()} == names
    seen = labels_of(families)
    assert {name: page_says[name] for name in seen if name in page_says} == {
        name: family for name, family in seen.items() if name in page_says
    }


async def test_metrics_of_the_master(tmp_path: Path) -> None:
    async with start_master(tmp_path) as master:
        metrics = master.cluster.metrics
        metrics.reports.labels("heartbeat")
        metrics.located.labels("complete")
        metrics.directives.labels("done")
        families = list(metrics.registry.collect())
    page_says = documented("Master")
    assert {name: kind for name, (kind, _) in page_says.items()} == names_and_types(families)
    seen = labels_of(families)
    assert {name: page_says[name] for name in seen} == seen
