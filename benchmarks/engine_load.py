"""Load for an engine over its OpenAI API: prompts of token ids that nobody has seen before."""

import asyncio
import random
import time

import httpx

FIRST_TOKEN_ID = 100
LAST_TOKEN_ID = 40_000


class Prompts:
    """Random prompts under a seed; no two share a block."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def batch(self, count: int, tokens: int) -> list[list[int]]:
        """``count`` prompts of ``tokens`` token ids each."""
        choose = self._random.randrange
        return [
            [choose(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(tokens)] for _ in range(count)
        ]


async def _complete_all(url: str, model: str, prompts: list[list[int]], max_tokens: int) -> int:
    async with httpx.AsyncClient(timeout=600) as client:

        async def one(prompt: list[int]) -> int:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            response = await client.post(f"{url}/v1/completions", json=body)
            response.raise_for_status()
            usage = response.json()["usage"]
            if usage["completion_tokens"] != max_tokens:
                raise RuntimeError(f"asked for {max_tokens} tokens, usage says {usage}")
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        return sum(await asyncio.gather(*map(one, prompts)))


def complete(url: str, model: str, prompts: list[list[int]], max_tokens: int) -> tuple[float, int]:
    """Sends all prompts at once: (seconds until the last answer, cached tokens of all)."""
    start = time.perf_counter()
    cached = asyncio.run(_complete_all(url, model, prompts, max_tokens))
    return time.perf_counter() - start, cached
