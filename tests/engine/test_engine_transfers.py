"""Loads and saves: cancelled, partial, late, never answered. Nothing leaks, nothing stalls."""

import pytest

from tests.engine.fake_connector import FakeConnector, Manner
from tests.engine.fake_model import FakeModel, greedy
from tests.engine.rig import ROOT, Rig

PROMPT = [(3 + i * 11) % 90 for i in range(22)]


def filled() -> FakeConnector:
    """A connector whose store has PROMPT."""
    connector = FakeConnector(ROOT)
    Rig(connector, num_pages=64).ask("earlier", PROMPT, 1)
    connector.close()
    return connector


def over(manner: Manner, *, num_pages: int = 64, **more: object) -> tuple[Rig, FakeConnector]:
    """A fresh engine over a store that has PROMPT and behaves so."""
    connector = FakeConnector(ROOT, filled().store, manner)
    rig = Rig(connector, num_pages=num_pages, max_context=80, **more)  # type: ignore[arg-type]
    return rig, connector


def computed(rig: Rig) -> int:
    assert isinstance(rig.model, FakeModel)
    return len(rig.model.computed)


def test_a_load_replaces_computing() -> None:
    rig, _ = over(Manner())
    answer = rig.ask("r", PROMPT, 3)
    assert answer.tokens == greedy(PROMPT, 3)
    assert answer.cache is not None
    assert (answer.cache.dram, answer.cache.hbm, answer.cache.end_reason) == (20, 0, "complete")
    assert computed(rig) == 2 + 2


def test_hbm_and_store_together_cover_a_prompt() -> None:
    rig, _ = over(Manner())
    rig.ask("head", PROMPT[:9], 1)
    answer = rig.ask("r", PROMPT, 1)
    assert answer.cache is not None
    assert (answer.cache.hbm, answer.cache.dram, answer.cache.total) == (8, 12, 20)


def test_the_reason_of_the_store_is_passed_on() -> None:
    rig, _ = over(Manner())
    answer = rig.ask("r", PROMPT[:12] + [1] * 10, 1)
    assert answer.cache is not None
    assert (answer.cache.dram, answer.cache.end_reason) == (12, "never_stored")


def test_a_reason_that_comes_after_the_match_is_in_time() -> None:
    rig, _ = over(Manner(late_reason="evicted"))
    answer = rig.ask("r", PROMPT[:12] + [1] * 10, 1)
    assert answer.cache is not None
    assert (answer.cache.dram, answer.cache.end_reason) == (12, "evicted")


@pytest.mark.parametrize("manner", [Manner(partial=1.0), Manner(lost=1.0)], ids=["partial", "lost"])
def test_I9_what_a_load_did_not_bring_is_computed(manner: Manner) -> None:
    rig, connector = over(manner)
    answer = rig.ask("r", PROMPT, 3)
    assert answer.tokens == greedy(PROMPT, 3)
    assert answer.cache is not None
    assert answer.cache.end_reason == ("timed_out" if manner.partial else "store_unavailable")
    assert computed(rig) == 22 - answer.cache.dram + 2
    assert rig.engine.counters.loads_short == 1
    assert connector.short_loads == 1


def test_I9_a_load_that_never_ends_is_recomputed_after_its_deadline() -> None:
    rig, connector = over(Manner(never_load=1.0), load_timeout_s=0.5)
    started = rig.clock.now
    rig.add("r", PROMPT, 3)
    while not rig.answers["r"].reason:
        rig.clock.now += rig.engine.wait_s() or 0.0
        rig.step()
    assert rig.answers["r"].tokens == greedy(PROMPT, 3)
    assert rig.clock.now - started < 0.55
    assert rig.answers["r"].cache is not None
    assert rig.answers["r"].cache.end_reason == "timed_out"
    # The lent pages stay out of use until the connector gives them back, and so does the one
    # block that was being saved.
    assert rig.engine.blocks.num_free == 64 - 5 - 1
    rig.step()
    assert rig.engine.blocks.num_free == 64 - 5
    connector.answer_all()
    rig.step()
    rig.engine.blocks.check_idle()


def test_I9_a_connector_that_is_late_once_does_not_hold_up_the_next_request() -> None:
    rig, connector = over(Manner(never_load=1.0), load_timeout_s=0.5)
    rig.add("r", PROMPT, 3)
    rig.step()
    rig.clock.now += 0.6
    rig.add("next", PROMPT, 3)
    before = rig.clock.now
    while not all(answer.reason for answer in rig.answers.values()):
        rig.step()
    assert rig.clock.now - before < 0.1
    assert connector.loads_started == 1
    connector.answer_all()
    rig.step()
    assert rig.ask("again", [5] * 9).reason == "length"


def test_I9_a_look_up_that_is_never_answered_is_a_miss() -> None:
    rig, _ = over(Manner(never_match=True), match_timeout_s=0.04)
    started = rig.clock.now
    answer = rig.ask("r", PROMPT, 1)
    assert answer.tokens == greedy(PROMPT, 1)
    assert 0.03 < rig.clock.now - started < 0.1
    assert answer.cache is not None
    assert (answer.cache.total, answer.cache.end_reason) == (0, "timed_out")


def test_I9_saves_that_never_end_cost_a_bounded_number_of_pages() -> None:
    connector = FakeConnector(ROOT, manner=Manner(never_save=True))
    rig = Rig(connector, num_pages=24, max_context=60)
    longest = rig.engine.max_context
    for i in range(12):
        prompt = [(i + j) % 90 for j in range(20)]
        rig.add(f"r{i}", prompt, 4)
        while not rig.answers[f"r{i}"].reason:
            rig.step()
        assert rig.answers[f"r{i}"].tokens == greedy(prompt, 4)
    assert rig.engine.transfers.saves_skipped > 0
    rig.add("long", [7] * (longest - 2), 50)
    while not rig.answers["long"].reason:
        rig.step()
    assert len(rig.answers["long"].tokens) == 2
    connector.answer_all()
    rig.step()
    rig.engine.blocks.check_idle()


def test_saves_that_found_no_room_are_made_later() -> None:
    connector = FakeConnector(ROOT, manner=Manner(save_delay_max=1))
    rig = Rig(connector, num_pages=20, max_context=48, max_batch_tokens=64)
    rig.add("r", [(j * 5) % 90 for j in range(24)], 1)
    rig.step()
    assert rig.answers["r"].reason
    assert rig.engine.blocks.num_pinned == 4
    rig.run()
    assert rig.engine.transfers.saves_skipped == 0
    assert rig.right_in_store() == 6
    rig.engine.blocks.check_idle()


def test_saves_are_asked_to_hurry_only_while_pages_are_short() -> None:
    connector = FakeConnector(ROOT, manner=Manner(save_delay_max=3))
    Rig(connector, num_pages=64, max_context=80).ask("r", PROMPT, 2)
    assert not connector.hurried
    small = FakeConnector(ROOT, manner=Manner(save_delay_max=3))
    Rig(small, num_pages=20, max_context=48, max_batch_tokens=64).ask("r", PROMPT, 2)
    assert small.hurried  # it may lend fewer pages than there are blocks to save


def test_a_request_that_finds_no_page_has_saves_hurry() -> None:
    connector = FakeConnector(ROOT, manner=Manner(never_save=True))
    rig = Rig(connector, num_pages=7, max_context=24, max_batch_tokens=64)
    rig.add("a", PROMPT[:5], 3)
    rig.step()
    assert not connector.hurried
    rig.add("b", [50 + token for token in range(22)], 1)
    rig.step()
    assert not rig.answers["b"].tokens
    assert connector.hurried


def test_a_block_that_left_hbm_before_it_was_saved_is_skipped() -> None:
    connector = FakeConnector(ROOT, manner=Manner(never_save=True))
    rig = Rig(connector, num_pages=20, max_context=48, max_batch_tokens=64)
    rig.add("r", PROMPT, 1)
    rig.step()
    rig.engine.reset_cache()
    connector.manner = Manner()
    connector.answer_all()
    rig.run()
    assert rig.engine.transfers.saves_skipped == 1
    assert rig.right_in_store() == 4


def test_a_request_is_saved_behind_its_parent_in_runs() -> None:
    class Watching(FakeConnector):
        seen: list[tuple[bytes | None, int]]

        def save(self, request_id, parent, blocks) -> None:  # type: ignore[no-untyped-def]
            self.seen.append((parent, len(blocks)))
            super().save(request_id, parent, blocks)

    connector = Watching(ROOT)
    connector.seen = []
    rig = Rig(connector, max_batch_tokens=8)
    rig.ask("r", PROMPT, 1)
    keys = list(connector.store)
    assert connector.seen == [(None, 2), (keys[1], 2), (keys[3], 1)]


def test_a_block_that_two_requests_compute_is_saved_once() -> None:
    connector = FakeConnector(ROOT)
    rig = Rig(connector, max_batch_tokens=64, num_pages=64, max_context=80)
    saved: list[bytes] = []
    original = connector.save

    def save(request_id: str, parent: bytes | None, blocks: list) -> None:  # type: ignore[type-arg]
        saved.extend(block.key for block in blocks)
        original(request_id, parent, blocks)

    connector.save = save  # type: ignore[method-assign]
    rig.add("a", PROMPT, 2)
    rig.add("b", PROMPT, 2)
    rig.run()
    assert len(saved) == len(set(saved)) == 5
    assert rig.answers["a"].tokens == rig.answers["b"].tokens == greedy(PROMPT, 2)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_I6_an_abort_during_a_load_frees_everything(steps: int) -> None:
    rig, connector = over(Manner(load_delay_max=4))
    rig.add("r", PROMPT, 50)
    for _ in range(steps):
        rig.step()
    assert rig.engine.abort("r")
    assert not rig.engine.abort("r")
    rig.run()
    assert not connector.busy
    assert not connector._known
    rig.engine.blocks.check_idle()
    assert rig.engine.wait_s() is None


def test_I6_an_aborted_load_that_never_ends_keeps_only_its_pages() -> None:
    rig, connector = over(Manner(never_load=1.0), load_timeout_s=0.1)
    rig.add("r", PROMPT, 5)
    rig.step()
    rig.engine.abort("r")
    assert rig.engine.blocks.num_free == 64 - 5
    rig.clock.now += 1
    rig.step()
    assert rig.engine.transfers.num_overdue == 1
    assert rig.ask_now("other", PROMPT).tokens == greedy(PROMPT, 4)
    connector.answer_all()
    rig.step()
    rig.engine.blocks.check_idle()


def test_I6_an_abort_during_a_save_frees_everything() -> None:
    connector = FakeConnector(ROOT, manner=Manner(save_delay_max=30), seed=4)
    rig = Rig(connector, num_pages=64, max_context=80)
    rig.add("r", PROMPT, 50)
    rig.step()
    rig.step()
    assert connector.busy
    rig.engine.abort("r")
    assert rig.engine.blocks.num_free < 64
    rig.run()
    rig.engine.blocks.check_idle()
    # What was on its way is whole: pages were kept until the copy.
    assert rig.right_in_store()


def test_the_same_id_waits_until_the_connector_has_answered() -> None:
    rig, connector = over(Manner(never_load=1.0))
    rig.add("r", PROMPT)
    rig.step()
    rig.engine.abort("r")
    with pytest.raises(ValueError, match="in use"):
        rig.add("r", PROMPT)
    connector.answer_all()
    rig.step()
    assert rig.engine.transfers.num_overdue == 0
    connector.manner = Manner()
    assert rig.ask("r", PROMPT).tokens == greedy(PROMPT, 4)


def test_a_load_that_is_answered_twice_is_counted_not_believed() -> None:
    rig, connector = over(Manner())
    original = connector._carry_out
    results = []

    def twice(load):  # type: ignore[no-untyped-def]
        results.append(original(load))
        return results[-1]

    connector._carry_out = twice  # type: ignore[method-assign]
    rig.ask("r", PROMPT, 1)
    poll = connector.poll()
    poll.loads.append(results[0])
    connector.poll = lambda: poll  # type: ignore[method-assign]
    rig.step()
    assert rig.engine.stats().counters["load_results_unexpected"] == 1
    rig.engine.blocks.check_idle()


def test_a_load_goes_in_parts_when_few_pages_may_be_lent() -> None:
    rig, connector = over(Manner(load_delay_max=2), num_pages=16)
    assert rig.engine.transfers.lend_max == 2
    answer = rig.ask("r", PROMPT, 1)
    assert answer.cache is not None
    assert (answer.cache.dram, answer.cache.end_reason) == (20, "complete")
    assert answer.tokens == greedy(PROMPT, 1)
    assert connector.loads_started == 3


def test_the_parts_of_a_load_have_one_deadline() -> None:
    rig, connector = over(Manner(), num_pages=16, load_timeout_s=0.1)
    rig.add("r", PROMPT, 1)
    rig.step()
    connector.manner = Manner(never_load=1.0)
    started = rig.clock.now
    rig.clock.now += 0.06
    while not rig.answers["r"].reason:
        rig.step()
    assert 0.09 < rig.clock.now - started < 0.11
    assert rig.answers["r"].tokens == greedy(PROMPT, 1)


def test_a_load_that_finds_all_pages_lent_waits_as_long_as_for_a_look_up() -> None:
    rig, connector = over(Manner(), num_pages=16, match_timeout_s=0.04)
    connector.manner = Manner(never_save=True)
    rig.ask_now("other", [9] * 9)
    blocks = rig.engine.blocks
    blocks.pin(page := blocks.allocate(1))
    blocks.free(page)
    rig.add("r", PROMPT, 1)
    started = rig.clock.now
    while not rig.answers["r"].reason:
        rig.step()
    assert 0.04 < rig.clock.now - started < 0.06
    cache = rig.answers["r"].cache
    assert cache is not None
    assert (cache.total, cache.end_reason) == (0, "no_space")
    blocks.unpin(page)


def test_salts_keep_prompts_apart() -> None:
    connector = FakeConnector(ROOT)
    rig = Rig(connector, num_pages=64)
    rig.ask("a", PROMPT, 1, salt="a")
    rig.ask("short", PROMPT[:2], 12, salt="a")
    for name, salt, expected in (("b", "b", 0), ("none", None, 0), ("same", "a", 20)):
        answer = rig.ask(name, PROMPT, 1, salt=salt)
        assert answer.cache is not None
        assert answer.cache.total == expected
    # A prompt shorter than a block: its first block is filled, and salted, by generated tokens.
    longer = PROMPT[:2] + rig.answers["short"].tokens[:10]
    for name, salt, expected in (("plain", None, 0), ("salted", "a", 8)):
        answer = rig.ask(name, longer, 1, salt=salt)
        assert answer.cache is not None
        assert answer.cache.total == expected


def test_closing_ends_requests_and_the_connector() -> None:
    rig, connector = over(Manner(load_delay_max=4))
    rig.add("r", PROMPT)
    rig.step()
    rig.engine.close()
    assert connector.closed
    assert rig.engine.stats().loading == 0
