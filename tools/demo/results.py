"""Results of the demo, and the file that they are written to."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.demo.measure import Answer

BLOCK_TOKENS = 64  # of a KV page and of a block in the store; the default of kvstore-engine
CACHED_SHARE_MIN = 0.95  # of the whole blocks that a warm case shares with what was cached before
CASES = ("cold", "hbm", "dram", "ssd", "restart", "shared")


@dataclass(frozen=True, slots=True)
class Case:
    """One case over all its questions: the median TTFT, and the least cached prefix."""

    name: str
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    source: dict[str, int | str]
    answers: tuple[Answer, ...]

    @classmethod
    def of(cls, name: str, answers: list[Answer]) -> "Case":
        """The case that ``answers`` make."""
        least = min(answers, key=lambda answer: answer.cached_tokens)
        return cls(
            name=name,
            ttft_s=statistics.median(answer.ttft_s for answer in answers),
            prompt_tokens=least.prompt_tokens,
            cached_tokens=least.cached_tokens,
            source=least.source,
            answers=tuple(answers),
        )

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """Cached tokens by tier."""
        return {tier: n for tier, n in self.source.items() if isinstance(n, int)}


def shortfall(cases: list[Case], shared: int) -> str:
    """Which warm cases had too little cached, in words; empty where all had enough.

    ``shared`` is the prefix of the case of that name, in tokens; the others repeat a whole prompt,
    of which the last token is always computed.
    """
    short = []
    for case in cases:
        prefix = shared if case.name == "shared" else case.prompt_tokens - 1
        whole = prefix // BLOCK_TOKENS * BLOCK_TOKENS
        if case.name != "cold" and (not whole or case.cached_tokens < CACHED_SHARE_MIN * whole):
            short.append(f"{case.name} had {case.cached_tokens:,} of {whole:,} tokens cached")
    return "; ".join(short)


def write(path: Path, model: str, shared: int, cases: list[Case], tokens_equal: bool) -> None:
    """Writes the results as JSON; ``shared`` is the prefix of the case of that name, in tokens."""
    rows = [
        {
            "case": case.name,
            "ttft_s": round(case.ttft_s, 4),
            "cached_tokens": case.cached_tokens,
            "source": case.source,
            "prompt_tokens": case.prompt_tokens,
            "shared_prefix_tokens": shared if case.name == "shared" else case.prompt_tokens,
            "answers": [asdict(answer) for answer in case.answers],
        }
        for case in cases
    ]
    result = {
        "model": model,
        "prompt_tokens": cases[0].prompt_tokens,
        "cases": rows,
        "tokens_equal": tokens_equal,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
