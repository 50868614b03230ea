"""What the engine counts."""

from collections import Counter
from dataclasses import dataclass, field

from kvstore_engine.messages import CacheUsage


@dataclass(slots=True)
class EngineCounters:
    """Monotonic counters since start; names are those of the metrics, units last."""

    steps: int = 0
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0  # all of a step but the model
    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    loads_overdue: int = 0
    loads_short: int = 0
    cached_tokens: Counter[str] = field(default_factory=Counter)  # by tier
    prefix_end: Counter[str] = field(default_factory=Counter)  # by reason
    finished: Counter[str] = field(default_factory=Counter)  # by finish reason

    def count_prefix(self, prompt_tokens: int, cache: CacheUsage) -> None:
        """A prompt has its first token: where its prefix came from."""
        self.prompt_tokens += prompt_tokens
        self.prefix_end[cache.end_reason] += 1
        for tier in ("hbm", "dram", "ssd", "remote"):
            self.cached_tokens[tier] += getattr(cache, tier)

    def plain(self) -> dict[str, float]:
        """The counters without labels."""
        names = ("steps", "step_seconds", "schedule_seconds", "prompt_tokens", "generated_tokens")
        more = ("computed_tokens", "loads_overdue", "loads_short")
        return {name: getattr(self, name) for name in (*names, *more)}

    def labelled(self) -> dict[str, dict[str, float]]:
        """The counters with one label each."""
        return {
            "cached_tokens": dict(self.cached_tokens),
            "prefix_end": dict(self.prefix_end),
            "finished": dict(self.finished),
        }
