"""From an API request to text: its sequences in the engine, their tokens, stops and usage."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from kvstore.errors import UnavailableError

from kvstore_engine.messages import (
    AddRequest,
    CacheUsage,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprob,
)
from kvstore_engine.server.engine_client import EngineClient
from kvstore_engine.server.errors import ApiError
from kvstore_engine.server.metrics import TIERS, Metrics
from kvstore_engine.server.stop import StopStrings
from kvstore_engine.tokenizer import DetokenizeStream, Tokenizer

SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Job:
    """What one HTTP request asks of the engine: each prompt ``n`` times."""

    prompts: list[list[int]]
    params: list[SamplingParams]  # one a prompt
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    cache_salt: str | None = None


@dataclass(slots=True)
class Delta:
    """What is new in one choice; ``finish_reason`` is set in its last one."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None  # the stop string that was met


@dataclass(slots=True)
class Usage:
    """Token counts of an answer; a prompt counts once, however many choices it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache: CacheUsage | None = None

    def add_cache(self, cache: CacheUsage) -> None:
        """Adds what one prompt found; prompts that end for several reasons are ``mixed``."""
        if self.cache is None:
            self.cache = CacheUsage(end_reason=cache.end_reason)
        for tier in TIERS:
            setattr(self.cache, tier, getattr(self.cache, tier) + getattr(cache, tier))
        if self.cache.end_reason != cache.end_reason:
            self.cache.end_reason = "mixed"

    def to_json(self) -> dict[str, object]:
        """The ``usage`` object of a response."""
        cache = self.cache or CacheUsage()
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cache.total},
            "kvstore": {tier: getattr(cache, tier) for tier in TIERS}
            | {"end_reason": cache.end_reason},
        }


@dataclass(slots=True)
class _Sequence:
    """One choice: its request in the engine, and the text that its tokens have made so far."""

    index: int
    prompt: int
    request_id: str
    detokenizer: DetokenizeStream
    stops: StopStrings
    min_tokens: int
    count: int = 0
    last_s: float | None = None  # when its latest tokens came
    done: bool = False

    def push(self, output: RequestOutput) -> Delta:
        """The delta for new tokens; a stop string may end the sequence before the engine does."""
        delta = Delta(self.index, "", [], [])
        for i, token in enumerate(output.tokens):
            delta.tokens.append(token)
            if output.logprobs is not None:
                delta.logprobs.append(output.logprobs[i])
            self.count += 1
            if output.finish_reason == "stop" and i == len(output.tokens) - 1:
                break  # the stop token itself is no text
            delta.text += self._text(self.detokenizer.push([token]))
            if self.stops.matched is not None:
                self.done = True
                delta.finish_reason, delta.stop_reason = "stop", self.stops.matched
                return delta
        if output.finish_reason is not None:
            self.done = True
            delta.text += self._text(self.detokenizer.flush()) + self.stops.flush()
            delta.finish_reason = output.finish_reason
            if self.stops.matched is not None:
                delta.finish_reason, delta.stop_reason = "stop", self.stops.matched
        return delta

    def _text(self, text: str) -> str:
        return text if self.count < self.min_tokens else self.stops.push(text)


@dataclass(slots=True)
class Generation:
    """The sequences of one HTTP request, while they run. ``close`` ends what has not ended."""

    engine: EngineClient
    tokenizer: Tokenizer
    metrics: Metrics
    job: Job
    usage: Usage = field(default_factory=Usage)
    _queue: asyncio.Queue[RequestOutput] = field(default_factory=asyncio.Queue)
    _open: dict[str, _Sequence] = field(default_factory=dict)
    _start_s: float = 0.0

    @property
    def choices(self) -> int:
        """Number of choices in the answer."""
        return len(self.job.prompts) * self.job.n

    def start(self, arrival_s: float, open_max: int) -> None:
        """Adds every sequence to the engine; ``arrival_s`` on the monotonic clock.

        Raises ApiError with 429 where more than ``open_max`` would be open, and with 503 without
        an engine.
        """
        self._start_s = arrival_s
        if self.engine.open_requests + self.choices > open_max:
            raise ApiError(429, f"{open_max} completions may be open at once; try again later")
        base = uuid.uuid4().hex
        try:
            for prompt in range(len(self.job.prompts)):
                self._add(prompt, base)
        except UnavailableError as error:
            self.close()
            raise ApiError(503, str(error)) from None
        self.usage.prompt_tokens = sum(map(len, self.job.prompts))

    def _add(self, prompt: int, base: str) -> None:
        """Adds one prompt, which goes to the engine once, with all of its choices."""
        params, first = self.job.params[prompt], prompt * self.job.n
        others: list[tuple[str, int | None]] = [
            (f"{base}-{first + i}", None if params.seed is None else (params.seed + i) % SEEDS)
            for i in range(1, self.job.n)
        ]
        tokens, salt = self.job.prompts[prompt], self.job.cache_salt
        request = AddRequest(f"{base}-{first}", tokens, params, salt, others)
        self.engine.add(request, self._queue.put_nowait)
        for index, request_id in enumerate(request.request_ids, first):
            self._open[request_id] = _Sequence(
                index,
                prompt,
                request_id,
                DetokenizeStream(self.tokenizer),
                StopStrings(self.job.stop, include=self.job.include_stop),
                params.min_tokens,
            )

    async def deltas(self) -> AsyncIterator[Delta]:
        """What comes, as it comes, until every choice has ended; ApiError if the engine fails."""
        while self._open:
            output = await self._queue.get()
            sequence = self._open.get(output.request_id)
            if sequence is not None:
                yield self._on_output(sequence, output)

    def _on_output(self, sequence: _Sequence, output: RequestOutput) -> Delta:
        if output.finish_reason == "error":
            self._finish(sequence, "error")
            status = 503 if self.engine.state == "dead" else 500
            raise ApiError(status, output.error or "the engine could not go on with the request")
        if output.finish_reason == "abort":
            self._finish(sequence, "abort")
            raise ApiError(503, "the engine is shutting down")
        first = sequence.count == 0
        if output.cache is not None and sequence.index % self.job.n == 0:
            self.usage.add_cache(output.cache)
            self.metrics.prompt(len(self.job.prompts[sequence.prompt]), output.cache)
        delta = sequence.push(output)
        self._measure(sequence, len(delta.tokens), first)
        if sequence.done:
            if output.finish_reason is None:
                self.engine.abort(output.request_id)
            self._finish(sequence, delta.finish_reason or "abort")
        return delta

    def _measure(self, sequence: _Sequence, count: int, first: bool) -> None:
        if not count:
            return
        now = time.monotonic()
        if first:
            self.metrics.first_token(now - self._start_s)
        self.usage.completion_tokens += count
        self.metrics.tokens(count, None if sequence.last_s is None else now - sequence.last_s)
        sequence.last_s = now

    def _finish(self, sequence: _Sequence, reason: str) -> None:
        self._open.pop(sequence.request_id, None)
        self.metrics.finished(reason)

    def close(self) -> None:
        """Frees what still runs in the engine; may be called at any time and again."""
        for sequence in list(self._open.values()):
            self.engine.abort(sequence.request_id)
            self._finish(sequence, "abort")
