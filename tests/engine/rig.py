"""An engine over the fake model on a virtual clock, checked after every step."""

from dataclasses import dataclass, field

import torch
from kvstore.core.keys import block_keys, salt_extra
from kvstore_engine.config import EngineConfig
from kvstore_engine.engine import Engine
from kvstore_engine.messages import AddRequest, CacheUsage, SamplingParams
from kvstore_engine.models.config import ModelConfig
from kvstore_engine.pages import allocate_pages
from kvstore_engine.runner import Model

from tests.engine.fake_connector import POISON, FakeConnector
from tests.engine.fake_model import FakeModel, fake_config

ROOT = bytes(range(32))
STEP_S = 0.001


@dataclass
class Clock:
    """Time that moves when it is told to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Answer:
    """All outputs of one request put together."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    cache: CacheUsage | None = None


class Rig:
    """Runs one engine to the end; ``config`` overrides small defaults."""

    def __init__(
        self,
        connector: FakeConnector | None = None,
        *,
        model: Model | None = None,
        model_config: ModelConfig | None = None,
        max_context: int = 4096,
        num_pages: int = 32,
        **config: object,
    ) -> None:
        values: dict[str, object] = {"page_tokens": 4, "max_batch_tokens": 16, "max_running": 8}
        values["warm_up"] = False
        self.config = EngineConfig(model="fake", **(values | config))  # type: ignore[arg-type]
        self.model = model or FakeModel()
        self.connector = connector
        self.clock = Clock()
        shape = model_config or fake_config(max_context)
        dtype = torch.float32 if model_config else torch.float64
        self.pages = allocate_pages(shape, num_pages, self.config.page_tokens, dtype)
        self.engine = Engine(
            self.config, self.model, shape, self.pages, ROOT, connector, clock=self.clock
        )
        self.engine.start()
        self.answers: dict[str, Answer] = {}
        self.prompts: dict[str, tuple[list[int], str | None]] = {}

    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 4,
        *,
        salt: str | None = None,
        **params: object,
    ) -> None:
        """Queues a greedy request."""
        chosen: dict[str, object] = {"temperature": 0.0, "max_tokens": max_tokens} | params
        sampling = SamplingParams(**chosen)  # type: ignore[arg-type]
        self.engine.add_request(AddRequest(name, prompt, sampling, salt))
        self.answers[name] = Answer()
        self.prompts[name] = prompt, salt

    def step(self) -> None:
        """One engine step, booked and checked."""
        for output in self.engine.step():
            answer = self.answers[output.request_id]
            assert answer.reason is None, "an output behind the last one"
            assert (output.cache is not None) == (not answer.tokens)
            answer.tokens += output.tokens
            answer.reason = output.finish_reason
            answer.cache = output.cache or answer.cache
        self.clock.now += STEP_S
        self.check()

    def run(self, steps_max: int = 5000) -> None:
        """Steps until nothing is left to do, and lent pages are back where they come back."""
        for _ in range(steps_max):
            wait_s = self.engine.wait_s()
            if wait_s is None and not (self.connector and self.connector.busy):
                return
            self.step()
        raise AssertionError(f"not done after {steps_max} steps: {self.engine.stats()}")

    def ask(self, name: str, prompt: list[int], max_tokens: int = 4, **more: object) -> Answer:
        """Adds a request and runs to its end."""
        self.add(name, prompt, max_tokens, **more)  # type: ignore[arg-type]
        self.run()
        return self.answers[name]

    def ask_now(self, name: str, prompt: list[int], max_tokens: int = 4) -> Answer:
        """Adds a request and runs until it has ended, whatever is still lent."""
        self.add(name, prompt, max_tokens)
        while self.answers[name].reason is None:
            self.step()
        return self.answers[name]

    def right_in_store(self) -> int:
        """How many of our blocks the store has; each must hold its own tokens and positions."""
        assert self.connector is not None
        found = 0
        for key, (index, tokens) in self.tokens_by_key().items():
            block = self.connector.store.get(key)
            if block is not None:
                first = index * len(tokens)
                expected = torch.tensor([[t, first + i] for i, t in enumerate(tokens)])
                assert (block[0, 0] == expected).all(), f"block {index} of a chain is wrong"
                found += 1
        return found

    def check(self) -> None:
        """The accounting identity; then every blank page is poisoned."""
        blocks, scheduler = self.engine.blocks, self.engine.scheduler
        blocks.check_integrity()
        holders = (*scheduler.running, *scheduler.loading, *scheduler.waiting)
        assert sum(blocks._refs) == sum(len(request.pages) for request in holders)
        assert blocks.num_pinned <= self.engine.transfers.lend_max
        self.pages[blocks._blank] = POISON
        if self.connector is not None and not self.connector.closed:
            assert self.connector.hbm == set(blocks._page_of)

    def tokens_by_key(self) -> dict[bytes, tuple[int, list[int]]]:
        """Every block key that any request could have made: its index, and its tokens."""
        size = self.config.page_tokens
        found = {}
        for name, (prompt, salt) in self.prompts.items():
            tokens = prompt + self.answers[name].tokens
            for i, key in enumerate(block_keys(ROOT, tokens, size, salt_extra(salt))):
                found[key] = i, tokens[i * size : (i + 1) * size]
        return found
