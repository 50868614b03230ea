"""What the server process and the engine process say to each other: msgpack over ZeroMQ."""

from collections.abc import Iterator
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to choose tokens. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # top alternatives a token; None: none at all


class AddRequest(msgspec.Struct, tag="add", omit_defaults=True):
    """A prompt to complete; validated by the server."""

    request_id: str
    prompt_tokens: list[int]
    params: SamplingParams
    cache_salt: str | None = None
    others: list[tuple[str, int | None]] = []  # more choices of the same prompt: id and seed

    @property
    def request_ids(self) -> list[str]:
        """Ids of all choices."""
        return [self.request_id, *(request_id for request_id, _ in self.others)]

    def choices(self) -> Iterator["AddRequest"]:
        """A request for each choice. They share one list of tokens."""
        yield self
        for request_id, seed in self.others:
            params = msgspec.structs.replace(self.params, seed=seed)
            yield AddRequest(request_id, self.prompt_tokens, params, self.cache_salt)


class AbortRequest(msgspec.Struct, tag="abort"):
    """The client went away or a stop string was met: free everything of the request."""

    request_id: str


class ResetCache(msgspec.Struct, tag="reset_cache"):
    """Forget the unreferenced pages of the engine's own prefix cache; the store keeps its own."""


class Shutdown(msgspec.Struct, tag="shutdown"):
    """End the engine process after freeing everything."""


ToEngine = AddRequest | AbortRequest | ResetCache | Shutdown


class CacheUsage(msgspec.Struct):
    """Where the cached prefix of a prompt came from, in tokens, and why it ended there."""

    hbm: int = 0
    dram: int = 0
    ssd: int = 0
    remote: int = 0
    end_reason: str = "never_stored"

    @property
    def total(self) -> int:
        """Tokens that were not computed again."""
        return self.hbm + self.dram + self.ssd + self.remote


class TokenLogprob(msgspec.Struct):
    """Natural log probability of the sampled token, and the ``n`` most likely ones."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class RequestOutput(msgspec.Struct, tag="output"):
    """New tokens of one request; the last one carries ``finish_reason``."""

    request_id: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None  # with finish_reason "error"
    cache: CacheUsage | None = None  # with the first token, and with an end before it


class EngineReady(msgspec.Struct, tag="ready"):
    """The model is loaded and warm."""

    model: str
    max_context: int
    num_pages: int
    page_tokens: int
    vocab_size: int  # of the model; its tokenizer may know more tokens, or fewer


class EngineFailed(msgspec.Struct, tag="failed"):
    """The engine could not start; ``usage`` says it was the user's input."""

    message: str
    usage: bool


class EngineStats(msgspec.Struct, tag="stats"):
    """Counters since start and gauges of now, sent about once a second while they change."""

    running: int
    waiting: int
    loading: int
    pages_total: int
    pages_free: int
    counters: dict[str, float]
    labelled: dict[str, dict[str, float]]  # metric -> label value -> count, e.g. miss reasons


FromEngine = RequestOutput | EngineReady | EngineFailed | EngineStats
