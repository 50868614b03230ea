"""The engine: requests in, tokens out, one step at a time. Single-threaded, without I/O."""

import time
from collections.abc import Callable

import torch
from kvstore.errors import InvalidArgumentError, ResourceExhaustedError

from kvstore_engine.block_manager import BlockManager
from kvstore_engine.config import EngineConfig
from kvstore_engine.kv_transfer import KVConnector
from kvstore_engine.messages import (
    AddRequest,
    EngineStats,
    FinishReason,
    RequestOutput,
    TokenLogprob,
)
from kvstore_engine.models.config import ModelConfig
from kvstore_engine.request import Request, RequestState
from kvstore_engine.runner import Model, Runner
from kvstore_engine.sampler import make_generator
from kvstore_engine.scheduler import Chunk, Scheduler
from kvstore_engine.stats import EngineCounters
from kvstore_engine.transfers import Transfers

LOOK_UP_POLL_S = 0.002
RETRY_S = 0.05


class Engine:
    """Paged KV, prefix cache, scheduler, model and connector put together.

    ``pages`` is the page storage (``pages.allocate_pages``), ``root`` the start of all key chains;
    with a connector it is the connector's. Call ``step`` while ``wait_s`` says so.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        model_config: ModelConfig,
        pages: torch.Tensor,
        root: bytes,
        connector: KVConnector | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        num_pages = pages.shape[0]
        context = min(config.max_context or model_config.max_context, model_config.max_context)
        lend_max = pages_to_lend(num_pages, context, config.page_tokens) if connector else 0
        self.config = config
        self.root = root
        self.max_context = min(context, (num_pages - lend_max) * config.page_tokens)
        self.counters = EngineCounters()
        self.blocks = BlockManager(num_pages)
        self.transfers = Transfers(
            connector,
            self.blocks,
            lend_max=lend_max,
            match_timeout_s=config.match_timeout_s,
            load_timeout_s=config.load_timeout_s,
        )
        self.scheduler = Scheduler(
            self.blocks,
            self.transfers,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
        )
        self.runner = Runner(model, pages, model_config.eos_token_ids)
        self.vocab_size = model_config.vocab_size
        self._eos_token_ids = frozenset(model_config.eos_token_ids)
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._progressed = False

    def start(self) -> None:
        """Warms up, then gives the pages to the connector. Once, before the first request."""
        if self.config.warm_up:
            self.runner.warm_up(min(self.config.max_batch_tokens, self.max_context - 1))
        self.transfers.register_pages(self.runner.pages)

    def add_request(self, message: AddRequest) -> None:
        """Queues a prompt. Raises InvalidArgumentError or ResourceExhaustedError, told apart by
        whether the same request can be right later.
        """
        self._check(message)
        request = Request(
            request_id=message.request_id,
            tokens=message.prompt_tokens,
            params=message.params,
            arrival=self._arrivals,
            page_tokens=self.config.page_tokens,
            root=self.root,
            cache_salt=message.cache_salt,
            generator=make_generator(message.params, self.config.seed + self._arrivals),
        )
        self._arrivals += 1
        self._requests[request.request_id] = request
        self.scheduler.add(request)
        self._progressed = True

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees all it holds; False when there is none (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, "abort")
        return True

    def reset_cache(self) -> int:
        """Forgets the blocks in HBM that no request uses; returns how many."""
        forgotten = self.blocks.reset()
        self.transfers.report_pages()
        return forgotten

    def step(self) -> list[RequestOutput]:
        """Takes what the connector brought, computes one batch, and returns the new tokens."""
        started = self._clock()
        self._take_transfers(started)
        preemptions = self.scheduler.preemptions
        chunks = self.scheduler.schedule(started)
        self.transfers.report_pages()
        self._progressed = bool(chunks) or self.scheduler.preemptions > preemptions
        if not chunks:
            return []
        computing = self._clock()
        sampled = self.runner.execute(chunks)
        computed = self._clock()
        outputs = [
            output
            for chunk in chunks
            if (output := self._advance(chunk, sampled.get(chunk.request.request_id))) is not None
        ]
        self.transfers.report_pages()
        ended = self._clock()
        self.counters.steps += 1
        self.counters.step_seconds += ended - started
        self.counters.schedule_seconds += (ended - started) - (computed - computing)
        return outputs

    def wait_s(self) -> float | None:
        """How long ``step`` has nothing to do unless the connector or a message wakes it.

        0: step now. None: nothing is due.
        """
        if self._progressed or self.scheduler.running:
            return 0.0
        if self.scheduler.num_looking:
            return LOOK_UP_POLL_S
        if self.scheduler.waiting:
            return RETRY_S  # for pages that loads hold, or the connector
        deadline = self.transfers.next_deadline()
        return None if deadline is None else max(0.0, deadline - self._clock())

    def stats(self) -> EngineStats:
        """Gauges of now and counters since start."""
        counters = self.counters.plain()
        counters["preemptions"] = self.scheduler.preemptions
        counters["save_blocks_skipped"] = self.transfers.saves_skipped
        counters["load_results_unexpected"] = self.transfers.results_unexpected
        if self.transfers.connector is not None:
            counters.update(self.transfers.connector.counters())
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            loading=len(self.scheduler.loading),
            pages_total=self.blocks.num_pages,
            pages_free=self.blocks.num_free,
            counters=counters,
            labelled=self.counters.labelled(),
        )

    def close(self) -> None:
        """Ends all requests and the connector."""
        for request_id in list(self._requests):
            self.abort(request_id)
        if self.transfers.connector is not None:
            self.transfers.connector.close()

    def _check(self, message: AddRequest) -> None:
        tokens, name = message.prompt_tokens, message.request_id
        if name in self._requests or self.transfers.owes(name):
            raise InvalidArgumentError(f"request id {name!r} is in use")
        if not tokens:
            raise InvalidArgumentError("the prompt is empty; give at least one token")
        if len(tokens) >= self.max_context:
            raise InvalidArgumentError(
                f"the prompt has {len(tokens)} tokens; with room for one more the context holds "
                f"{self.max_context - 1}"
            )
        known = (*tokens, *message.params.stop_token_ids)
        if not 0 <= min(known) <= max(known) < self.vocab_size:
            wrong = next(token for token in known if not 0 <= token < self.vocab_size)
            raise InvalidArgumentError(
                f"token id {wrong} is not in the model's vocabulary; give ids from 0 to "
                f"{self.vocab_size - 1}"
            )
        if message.params.max_tokens < 1:
            raise InvalidArgumentError(f"max_tokens is {message.params.max_tokens}; take 1 or more")
        if len(self.scheduler.waiting) >= self.config.max_waiting:
            raise ResourceExhaustedError(
                f"{len(self.scheduler.waiting)} requests are waiting; try again later"
            )

    def _take_transfers(self, now: float) -> None:
        for load, result in self.transfers.poll():
            self.counters.loads_short += result.blocks < len(load.pages)
            self.scheduler.load_ended(load, result)
        for load in self.transfers.expire(now):
            self.counters.loads_overdue += 1
            self.scheduler.load_overdue(load)

    def _advance(
        self, chunk: Chunk, sampled: tuple[int, TokenLogprob | None] | None
    ) -> RequestOutput | None:
        """Books a computed chunk: new blocks, their saving, the new token, perhaps the end."""
        request = chunk.request
        request.num_computed += chunk.num_tokens
        self.counters.computed_tokens += chunk.num_tokens
        self.transfers.save(request, self.scheduler.register_blocks(request))
        if sampled is None:
            return None
        token, logprob = sampled
        cache = None
        if not request.num_output:
            self.transfers.explain(request)
            cache = request.cache
            self.counters.count_prefix(request.num_prompt, cache)
        request.append(token)
        self.counters.generated_tokens += 1
        reason = self._finish_reason(request, token)
        if reason is not None:
            self._end(request, reason)
        return RequestOutput(
            request_id=request.request_id,
            tokens=[token],
            logprobs=None if logprob is None else [logprob],
            finish_reason=reason,
            cache=cache,
        )

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        params = request.params
        if request.num_output >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop"
            if token in self._eos_token_ids and not params.ignore_eos:
                return "stop"
        if request.num_output >= params.max_tokens or len(request.tokens) >= self.max_context:
            return "length"
        return None

    def _end(self, request: Request, reason: FinishReason) -> None:
        del self._requests[request.request_id]
        self.scheduler.remove(request)
        self.transfers.forget(request)
        self.counters.finished[reason] += 1
        assert request.state is RequestState.FINISHED


def pages_to_lend(num_pages: int, max_context: int, page_tokens: int) -> int:
    """How many pages a connector may hold at once: what the longest request leaves, and at least
    an eighth.

    Requests are held to what remains, so that pages which never come back stop nobody.
    """
    longest = -(-max_context // page_tokens)
    return max(num_pages - longest, num_pages // 8, 1)
