"""Results of the demo, and the file that they are written to."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.demo.measure import Answer

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
