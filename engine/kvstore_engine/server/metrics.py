"""Prometheus metrics of the server and, through it, of the engine process."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvstore_engine.messages import CacheUsage, EngineStats
from kvstore_engine.server.counter_texts import COUNTER_TEXTS, OTHER_TEXT

PREFIX = "kvstore_engine_"
TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
GAP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
TIERS = ("hbm", "dram", "ssd", "remote")
# The engine counts these too; the server's counts are those of the responses, and are the metrics.
COUNTED_HERE = frozenset(
    {"prompt_tokens", "generated_tokens", "cached_tokens", "prefix_end", "finished"}
)


class Metrics:
    """What the server counts itself, in a registry of its own."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        """``stats``: the latest word of the engine process, None before the first."""
        self.registry = registry = CollectorRegistry()
        self._responses = Counter(
            PREFIX + "http_responses", "HTTP responses", ["route", "status"], registry=registry
        )
        self._requests = Counter(
            PREFIX + "requests",
            "Completions that ended, by reason; each of n choices counts",
            ["finish_reason"],
            registry=registry,
        )
        self._prompt = Counter(PREFIX + "prompt_tokens", "Tokens of prompts", registry=registry)
        self._generated = Counter(
            PREFIX + "generation_tokens", "Tokens that were generated", registry=registry
        )
        self._cached = Counter(
            PREFIX + "cached_tokens",
            "Prompt tokens that were not computed again, by where they came from",
            ["tier"],
            registry=registry,
        )
        self._prefix_ends = Counter(
            PREFIX + "prefix_ends",
            "Prompts by the reason why their cached prefix ended",
            ["reason"],
            registry=registry,
        )
        self._ttft = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._gap = Histogram(
            PREFIX + "inter_token_latency_seconds",
            "Between two tokens of one completion",
            buckets=GAP_BUCKETS_S,
            registry=registry,
        )
        for tier in TIERS:
            self._cached.labels(tier)
        for reason in ("stop", "length", "abort", "error"):
            self._requests.labels(reason)
        registry.register(EngineCollector(stats))

    def responded(self, route: str, status: int) -> None:
        """An HTTP response has ended."""
        self._responses.labels(route, str(status)).inc()

    def prompt(self, tokens: int, cache: CacheUsage) -> None:
        """A prompt's cache lookup is decided; its counts go into the response's usage too."""
        self._prompt.inc(tokens)
        for tier in TIERS:
            self._cached.labels(tier).inc(getattr(cache, tier))
        self._prefix_ends.labels(cache.end_reason).inc()

    def first_token(self, seconds: float) -> None:
        """A completion has its first token."""
        self._ttft.observe(seconds)

    def tokens(self, count: int, gap_s: float | None) -> None:
        """``count`` tokens came, the last ones ``gap_s`` ago; None for the first."""
        self._generated.inc(count)
        if gap_s is not None and count:
            for _ in range(count):
                self._gap.observe(gap_s / count)

    def finished(self, reason: str) -> None:
        """A completion ended."""
        self._requests.labels(reason).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Turns the engine's latest statistics into metrics at the moment they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """All families; gauges are 0 while the engine has said nothing."""
        stats = self._stats() or EngineStats(0, 0, 0, 0, 0, {}, {})
        gauges: dict[str, tuple[str, int]] = {
            "requests_running": ("Requests in the running batch", stats.running),
            "requests_waiting": ("Requests that wait for room", stats.waiting),
            "requests_loading": ("Requests whose prefix is being loaded", stats.loading),
            "pages_total": ("KV pages of the engine", stats.pages_total),
            "pages_free": ("KV pages that nobody refers to", stats.pages_free),
        }
        for name, (text, gauge) in gauges.items():
            yield GaugeMetricFamily(PREFIX + name, text, gauge)
        for name in sorted(stats.counters.keys() - COUNTED_HERE):
            text = COUNTER_TEXTS.get(name, OTHER_TEXT)
            yield CounterMetricFamily(PREFIX + name, text, stats.counters[name])
        for name in sorted(stats.labelled.keys() - COUNTED_HERE):
            text = COUNTER_TEXTS.get(name, OTHER_TEXT)
            family = CounterMetricFamily(PREFIX + name, text, labels=["kind"])
            for kind, count in sorted(stats.labelled[name].items()):
                family.add_metric([kind], count)
            yield family
