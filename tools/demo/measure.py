"""Asks a question over HTTP and takes the time to its first token."""

import json
import time
from dataclasses import dataclass

import httpx

MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one question: TTFT in seconds, tokens, and where the prefix was."""

    ttft_s: float
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    source: dict[str, int | str]


def ask(url: str, model: str, messages: list[dict[str, str]], salt: str) -> Answer:
    """Streams a greedy answer; ``salt`` keeps its cache apart from other salts'."""
    body = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
        "return_token_ids": True,
    }
    first: float | None = None
    tokens: list[int] = []
    usage = None
    start = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300) as response:
        if response.status_code != 200:
            raise RuntimeError(f"the engine answered {response.status_code}: {response.read()!r}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if new := choice.get("token_ids"):
                    first = first or time.perf_counter()
                    tokens.extend(new)
    if first is None or usage is None:
        raise RuntimeError("the engine ended its answer without a token or without usage")
    return Answer(
        ttft_s=first - start,
        tokens=tuple(tokens),
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        source=usage["kvstore"],
    )
