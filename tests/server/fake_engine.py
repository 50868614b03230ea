"""A process that speaks the engine's side of messages.py, and does what its input says.

The configured ``engine_id`` says how it starts, a request's ``cache_salt`` how it is answered.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass, field

import zmq
from kvstore_engine import wire
from kvstore_engine.messages import (
    AbortRequest,
    AddRequest,
    CacheUsage,
    EngineFailed,
    EngineReady,
    EngineStats,
    FinishReason,
    FromEngine,
    RequestOutput,
    ResetCache,
    Shutdown,
    ToEngine,
    TokenLogprob,
)

MAX_CONTEXT = 256
VOCAB = 260
SLOW_STEP_S = 0.02


@dataclass
class Running:
    """A request and how many tokens it has."""

    request: AddRequest
    made: int = 0


@dataclass
class FakeEngine:
    """Answers with the prompt's own tokens over and over, one token a step."""

    send: zmq.Socket[bytes]
    running: dict[str, Running] = field(default_factory=dict)
    counters: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("aborted_requests", "cache_resets", "added_requests", "added_prompts"), 0
        )
    )
    seeds: dict[str, float] = field(default_factory=dict)

    def say(self, *messages: FromEngine) -> None:
        """One frame."""
        self.send.send(wire.encode(list(messages)))

    def on_message(self, message: ToEngine) -> None:
        """Takes a message in, and tells the new counts."""
        match message:
            case AddRequest():
                if message.cache_salt == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                self.counters["added_prompts"] += 1
                for choice in message.choices():
                    self.counters["added_requests"] += 1
                    self.seeds[str(choice.params.seed)] = 1
                    self.running[choice.request_id] = Running(choice)
            case AbortRequest():
                if self.running.pop(message.request_id, None):
                    self.counters["aborted_requests"] += 1
            case ResetCache():
                self.counters["cache_resets"] += 1
            case Shutdown():
                sys.exit(0)
        self.say(self.stats())

    def stats(self) -> EngineStats:
        """Counts and gauges."""
        loading = sum(r.request.cache_salt == "hang" for r in self.running.values())
        labelled = {"seen_seeds": self.seeds, "prefix_end": {"doubled": 1.0}}
        running = len(self.running) - loading
        return EngineStats(running, 3, loading, 8, 5, dict(self.counters), labelled)

    def step(self) -> None:
        """One token for each running request."""
        outputs = [o for r in list(self.running.values()) if (o := self.output(r)) is not None]
        if outputs:
            self.say(*outputs)

    def output(self, running: Running) -> RequestOutput | None:
        """The next output of one request."""
        request, params = running.request, running.request.params
        salt = request.cache_salt
        if salt == "hang":
            return None
        if salt in ("error", "late-error") and running.made == (2 if salt == "late-error" else 0):
            del self.running[request.request_id]
            return RequestOutput(request.request_id, [], finish_reason="error", error="no luck")
        if salt == "abort":
            del self.running[request.request_id]
            return RequestOutput(request.request_id, [], finish_reason="abort")
        if salt == "slow":
            time.sleep(SLOW_STEP_S)
        token = request.prompt_tokens[running.made % len(request.prompt_tokens)]
        cache = CacheUsage(hbm=2, dram=1, end_reason="evicted") if running.made == 0 else None
        running.made += 1
        done = token in params.stop_token_ids
        full = running.made == params.max_tokens
        if done or full:
            del self.running[request.request_id]
        logprobs = None
        if params.logprobs is not None:
            top = [(token - i, -0.5 - i) for i in range(params.logprobs)]
            logprobs = [TokenLogprob(token, -0.5, top)]
        reason: FinishReason | None = "stop" if done else "length" if full else None
        return RequestOutput(request.request_id, [token], logprobs, reason, None, cache)


def main() -> None:
    """Entry point."""
    launch = wire.decode_launch(sys.stdin.buffer.readline())
    manner = launch.engine.engine_id
    if manner == "crash":
        sys.exit(7)
    context = zmq.Context()
    send, receive = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    send.connect(launch.outputs)
    if manner != "connects-late":
        receive.connect(launch.requests)
    engine = FakeEngine(send)
    if manner.startswith("fail"):
        engine.say(EngineFailed("no such luck", usage=manner == "fail-usage"))
        context.destroy(linger=1000)
        sys.exit(2)
    if manner == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if manner in ("stubborn", "slow"):
        time.sleep(60)
    send.send(b"\xc1 is no msgpack")
    engine.say(EngineReady(launch.engine.model, MAX_CONTEXT, 8, 64, VOCAB))
    if manner == "connects-late":
        time.sleep(0.5)
        receive.connect(launch.requests)
    parent = os.getppid()
    while os.getppid() == parent:
        if receive.poll(0 if engine.running else 200):
            for message in wire.decode_to_engine(receive.recv()):
                engine.on_message(message)
        engine.step()
        time.sleep(0.001)


if __name__ == "__main__":
    main()
