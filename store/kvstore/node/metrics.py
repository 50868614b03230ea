"""What the node shows to Prometheus; read from the core when asked, nothing is kept twice."""

import asyncio

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.node.node import Node

TIMEOUT_S = 2.0
GUARDED = {  # what the core counts each time that it kept a promise which something tried to break
    "I1": ("commit_corrupt_blocks", "corrupt_blocks", "scrub_corrupt_blocks"),
    "I3": ("ssd_given_up_blocks", "ssd_write_errors"),
    "I5": ("stale_epoch_orders",),
    "I7": ("refused_full_blocks",),
    "I8": ("restore_refused_records",),
}


class NodeCollector(Collector):
    """The node's gauges and counters, sampled on the node's event loop for a scraping thread."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._loop = asyncio.get_running_loop()

    def collect(self) -> list[Metric]:
        """One sample of everything; TimeoutError if the node is too busy to give it."""
        return asyncio.run_coroutine_threadsafe(self._sample(), self._loop).result(TIMEOUT_S)

    async def _sample(self) -> list[Metric]:
        node = self._node
        gauges = (
            ("sessions", "Open client sessions", node.clients.open_count),
            ("pinned_blocks", "Blocks under at least one lease", node.core.pinned_blocks()),
            ("master_connected", "Whether the master answers", int(node.link.connected)),
            ("hbm_keys_refused", "HBM keys beyond the limit", node.hbm.refused),
            (
                "pool_small_pages_bytes",
                "What of the pool is in small pages, not in huge ones",
                node.huge_pages.small_bytes,
            ),
            (
                "scrub_pass_finished_seconds",
                "Unix time at which the last pass of the scrubber ended; 0: none so far",
                node.scrubber.pass_finished_unix_s if node.scrubber else 0,
            ),
            (
                "ssd_verifies_all",
                "Whether every block is verified before its write, also while writes queue up",
                int(node.driver.ssd is not None and node.driver.ssd.verifies_all),
            ),
            ("ssd_failed", "Whether the SSD takes no more writes", int(self._ssd_failed())),
        )
        return [
            self._space(),
            self._imbalance(),
            self._blocks(),
            self._guarded(),
            self._broken(),
            *(GaugeMetricFamily(f"kvstore_node_{n}", text, value=v) for n, text, v in gauges),
            *(
                CounterMetricFamily(f"kvstore_node_{name}", f"Events: {name}", value=count)
                for name, count in node.core.counters.items()
            ),
        ]

    def _blocks(self) -> Metric:
        blocks = GaugeMetricFamily("kvstore_node_blocks", "Readable blocks", labels=["tier"])
        for usage in self._node.core.usage():
            blocks.add_metric([usage.tier.name.lower()], usage.blocks)
        return blocks

    def _imbalance(self) -> Metric:
        imbalance = GaugeMetricFamily(
            "kvstore_node_space_imbalance_bytes",
            "How far rows, slots and accounts were apart in the last audit of the idle node",
            labels=["tier"],
        )
        for tier, nbytes in self._node.auditor.imbalance_bytes.items():
            imbalance.add_metric([tier.name.lower()], nbytes)
        return imbalance

    def _guarded(self) -> Metric:
        counters = self._node.core.counters
        guarded = CounterMetricFamily(
            "kvstore_node_promise_guarded",
            "Events that would have broken a promise, had the node not acted",
            labels=["promise"],
        )
        for promise, names in GUARDED.items():
            guarded.add_metric([promise], sum(counters.get(name, 0) for name in names))
        return guarded

    def _broken(self) -> Metric:
        broken = CounterMetricFamily(
            "kvstore_node_promise_broken",
            "Audits of the idle node that found a promise broken: a bug",
            labels=["promise"],
        )
        for promise, count in self._node.auditor.broken.items():
            broken.add_metric([promise], count)
        return broken

    def _ssd_failed(self) -> bool:
        return self._node.driver.ssd is not None and bool(self._node.driver.ssd.failed)

    def _space(self) -> Metric:
        space = GaugeMetricFamily(
            "kvstore_node_space_bytes",
            "Space by state; free + live + pending + quarantined = capacity",
            labels=["tier", "state"],
        )
        for usage in self._node.core.usage():
            tier = usage.tier.name.lower()
            for state in ("capacity", "free", "live", "pending", "quarantined"):
                space.add_metric([tier, state], getattr(usage, f"{state}_bytes"))
        return space


def node_registry(node: Node) -> CollectorRegistry:
    """A registry of this node alone."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(NodeCollector(node))
    return registry
