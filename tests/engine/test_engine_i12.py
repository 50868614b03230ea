"""I12: greedy tokens with caches, loads, preemption and aborts equal those of a plain run."""

import os
import random

import pytest
from kvstore_engine.loader import load_model

from tests.engine.fake_connector import FakeConnector, Manner
from tests.engine.fake_model import greedy
from tests.engine.rig import ROOT, Rig

FIRST_SEED = int(os.environ.get("KVSTORE_SEED", "0"))
SCHEDULES = 200
REAL_SCHEDULES = int(os.environ.get("KVSTORE_REAL_SCHEDULES", "20"))


def random_prompts(rng: random.Random, count: int, length_max: int) -> list[list[int]]:
    """Prompts that share prefixes of all lengths."""
    stems = [[rng.randrange(90) for _ in range(length_max)] for _ in range(2)]
    prompts = []
    for _ in range(count):
        stem = rng.choice(stems)[: rng.randint(0, length_max)]
        tail = [rng.randrange(90) for _ in range(rng.randint(0, 6))]
        prompts.append((stem + tail)[:length_max] or [1])
    return prompts


def random_manner(rng: random.Random) -> Manner:
    return Manner(
        match_delay_max=rng.choice([0, 0, 3, 80]),
        load_delay_max=rng.choice([0, 2, 10, 40]),  # 40 is beyond the deadline
        save_delay_max=rng.choice([0, 3, 20]),
        partial=rng.choice([0, 0.3]),
        lost=rng.choice([0, 0.2]),
        never_load=rng.choice([0, 0, 0.2]),
        never_match=rng.random() < 0.03,
        never_save=rng.random() < 0.05,
    )


class Schedule:
    """One random run: what arrives when, with how many pages, over which store."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        rng = self.rng
        self.page_tokens = rng.choice([2, 4, 8])
        self.length_max = rng.randint(8, 40)
        self.max_tokens = rng.randint(2, 30)
        longest = -(-(self.length_max + self.max_tokens + 1) // self.page_tokens)
        self.max_running = rng.randint(1, 6)
        self.connector: FakeConnector | None = None
        if rng.random() < 0.8:
            self.connector = FakeConnector(ROOT, manner=random_manner(rng), seed=seed)
        # With a connector, requests are held to what is never lent.
        fewest = -(-longest * 8 // 7) + 1 if self.connector else longest
        self.num_pages = fewest + rng.randint(0, longest // 2)
        self.prompts = random_prompts(rng, rng.randint(2, 9), self.length_max)

    def rig(self, **more: object) -> Rig:
        return Rig(
            self.connector,
            num_pages=self.num_pages,
            page_tokens=self.page_tokens,
            max_batch_tokens=self.max_running + self.rng.randint(0, 24),
            max_running=self.max_running,
            match_timeout_s=0.03,
            load_timeout_s=0.02,
            **more,  # type: ignore[arg-type]
        )

    def fill_store(self, **more: object) -> None:
        """An earlier engine leaves some of the prompts in the store."""
        if self.connector is None or self.rng.random() < 0.3:
            return
        earlier = FakeConnector(ROOT, self.connector.store)
        rig = Rig(earlier, num_pages=200, page_tokens=self.page_tokens, **more)  # type: ignore[arg-type]
        for i, prompt in enumerate(self.prompts[::2]):
            rig.add(f"earlier{i}", prompt, self.max_tokens)
        rig.run()
        earlier.close()

    def play(self, rig: Rig) -> None:
        """Adds the prompts in random order at random times, and aborts some on their way."""
        order = list(enumerate(self.prompts))
        self.rng.shuffle(order)
        for i, prompt in order:
            salt = self.rng.choice([None, None, "a"])
            rig.add(f"r{i}", prompt, self.rng.randint(1, self.max_tokens), salt=salt)
            for _ in range(self.rng.choice([0, 0, 1, 3, 12])):
                rig.step()
            if self.rng.random() < 0.25:
                rig.engine.abort(f"r{self.rng.randrange(len(self.prompts))}")
            if self.rng.random() < 0.1:
                rig.engine.reset_cache()
        for _ in range(2000):
            if all(a.reason or n not in rig.engine._requests for n, a in rig.answers.items()):
                break
            rig.step()
        self.finish(rig)

    def finish(self, rig: Rig) -> None:
        """What was never answered is answered now; then everything must be free."""
        for _ in range(50):
            if self.connector is not None:
                self.connector.answer_all()
            rig.step()
        rig.engine.blocks.check_idle()
        assert rig.engine.wait_s() is None
        if self.connector is not None:
            assert not self.connector.busy
            assert not self.connector._known
            self.connector.close()


def test_I12_tokens_equal_a_plain_run_over_200_random_schedules() -> None:
    stored = preemptions = loads = short = overdue = finished = aborted = 0
    for seed in range(FIRST_SEED, FIRST_SEED + SCHEDULES):
        print(f"seed={seed}")
        schedule = Schedule(seed)
        schedule.fill_store()
        rig = schedule.rig()
        schedule.play(rig)
        for name, answer in rig.answers.items():
            prompt, _ = rig.prompts[name]
            assert answer.tokens == greedy(prompt, len(answer.tokens)), f"seed {seed} {name}"
            finished += answer.reason == "length"
            aborted += answer.reason is None
        preemptions += rig.engine.scheduler.preemptions
        overdue += rig.engine.counters.loads_overdue
        if schedule.connector is not None:
            loads += schedule.connector.loads_started
            short += schedule.connector.short_loads
            stored += rig.right_in_store()
    # The schedules have to reach what they are for.
    counts = (stored, preemptions, loads, short, overdue, finished, aborted)
    print("stored, preemptions, loads, short, overdue, finished, aborted:", counts)
    assert min(counts) >= 20


@pytest.mark.parametrize("name", ["tiny-random", "tiny-random-qwen3"])
def test_I12_holds_for_real_attention(name: str) -> None:
    loaded = load_model(name)
    more = {"model": loaded.model, "model_config": loaded.config}
    for seed in range(FIRST_SEED, FIRST_SEED + REAL_SCHEDULES):
        print(f"seed={seed}")
        schedule = Schedule(seed)
        schedule.fill_store(**more)
        rig = schedule.rig(**more)
        schedule.play(rig)
        for request, answer in rig.answers.items():
            if answer.tokens:
                plain = Rig(num_pages=200, max_batch_tokens=512, **more)  # type: ignore[arg-type]
                prompt, _ = rig.prompts[request]
                expected = plain.ask("plain", prompt, len(answer.tokens), ignore_eos=True)
                assert answer.tokens == expected.tokens, f"seed {seed} {request}"
