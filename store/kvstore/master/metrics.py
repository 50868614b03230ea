"""Figures of a master for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvstore.core.locations import Locations
from kvstore.master.membership import Membership, NodeState
from kvstore.master.watch import Watchers

PREFIX = "kvstore_master_"
LOCATE_BUCKETS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0)


class MasterMetrics:
    """Counters that handlers raise."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reports = self._counter("reports", "reports from nodes, by kind", "kind")
        self.located = self._counter(
            "locate_ends", "Locate calls, by why the prefix ended", "reason"
        )
        self.locate_keys = self._counter("locate_keys", "keys asked for in Locate calls")
        self.locate_found = self._counter("locate_found", "leading keys that Locate calls found")
        self.resyncs = self._counter("resyncs", "inventories that did not add up and were redone")
        self.refused = self._counter("index_refused", "keys not indexed, for the index is full")
        self.directives = self._counter("directives", "directives to nodes, by outcome", "outcome")
        self.locate_seconds = Histogram(
            PREFIX + "locate_seconds",
            "time of a Locate in the index, in seconds",
            buckets=LOCATE_BUCKETS_S,
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)


class StateCollector(Collector):
    """Gauges that are read from the master's state when somebody asks.

    Prometheus asks on another thread. What is read here is copied in one step before it is gone
    through; figures of one answer may still be a moment apart.
    """

    def __init__(self, locations: Locations, members: Membership, watchers: Watchers) -> None:
        self._locations = locations
        self._members = members
        self._watchers = watchers

    def collect(self) -> Iterable[Metric]:
        """The gauges as they are now."""
        nodes = GaugeMetricFamily(PREFIX + "nodes", "known nodes, by state", labels=["state"])
        for state in NodeState:
            nodes.add_metric([state.value], len(self._members.in_state(state)))
        yield nodes
        blocks = GaugeMetricFamily(
            PREFIX + "blocks", "indexed blocks, once for each place", labels=["node", "tier"]
        )
        totals: dict[tuple[str, str], int] = {}
        for place, count in self._locations.counts().items():
            where = (place.node_id, place.tier.name)
            totals[where] = totals.get(where, 0) + count
        for labels, count in sorted(totals.items()):
            blocks.add_metric(labels, count)
        yield blocks
        for name, text, value in (
            ("index_bytes", "estimated memory of the index", self._locations.memory_bytes()),
            ("watchers", "open Watch calls", len(self._watchers)),
            ("nodes_lost_total", "times that a node was lost", self._members.lost_total),
        ):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
