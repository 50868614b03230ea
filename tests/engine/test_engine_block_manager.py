"""Pages: references, pins, the prefix cache, eviction, and the accounting identity."""

import random

import pytest
from kvstore_engine.block_manager import BlockManager


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def cached_chain(blocks: BlockManager, first: int, count: int) -> list[int]:
    """``count`` blocks of one chain, computed and let go."""
    pages = blocks.allocate(count)
    for depth, page in enumerate(pages):
        blocks.register(page, key(first + depth), depth)
    blocks.free(pages)
    return pages


def keys(first: int, count: int) -> list[bytes]:
    return [key(i) for i in range(first, first + count)]


def test_match_finds_the_leading_cached_blocks() -> None:
    blocks = BlockManager(8)
    pages = cached_chain(blocks, 0, 3)
    assert blocks.match(keys(0, 5)) == pages
    assert blocks.match([key(9), *keys(0, 3)]) == []


def test_the_deepest_block_of_the_oldest_chain_is_evicted_first() -> None:
    blocks = BlockManager(6)
    cached_chain(blocks, 0, 3)
    cached_chain(blocks, 10, 3)
    blocks.drain_events()
    blocks.allocate(4)
    assert blocks.drain_events()[1] == [key(2), key(1), key(0), key(12)]


def test_a_use_makes_a_prefix_younger() -> None:
    blocks = BlockManager(6)
    chain = cached_chain(blocks, 0, 3)
    cached_chain(blocks, 10, 3)
    blocks.reference(chain[:1])
    blocks.free(chain[:1])
    blocks.drain_events()
    blocks.allocate(5)
    assert blocks.drain_events()[1] == [key(2), key(1), key(12), key(11), key(10)]


def test_a_page_that_comes_back_late_from_saving_does_not_outlive_its_parent() -> None:
    blocks = BlockManager(4)
    pages = blocks.allocate(3)
    for depth, page in enumerate(pages):
        blocks.register(page, key(depth), depth)
    blocks.pin(pages)
    blocks.free(pages)
    for page in pages:  # shallow ones first, as saving goes
        blocks.unpin([page])
    blocks.drain_events()
    blocks.allocate(3)
    assert blocks.drain_events()[1] == [key(2), key(1)]


def test_a_lent_page_is_neither_free_nor_evicted() -> None:
    blocks = BlockManager(3)
    pages = blocks.allocate(2)
    blocks.pin(pages)
    blocks.free(pages)
    assert (blocks.num_free, blocks.num_pinned) == (1, 2)
    assert not blocks.can_allocate(2)
    blocks.unpin(pages)
    assert blocks.can_allocate(3)
    blocks.check_idle()


def test_a_cached_page_can_be_lent() -> None:
    blocks = BlockManager(3)
    pages = cached_chain(blocks, 0, 2)
    assert blocks.holds(pages[0], key(0))
    assert not blocks.holds(pages[0], key(1))
    blocks.pin(pages)
    blocks.check_integrity()
    assert blocks.num_free == 1
    blocks.unpin(pages)
    assert blocks.match(keys(0, 2)) == pages
    blocks.check_idle()


def test_pages_in_use_do_not_count_beside_an_allocation() -> None:
    blocks = BlockManager(4)
    pages = cached_chain(blocks, 0, 2)
    assert blocks.can_allocate(2, beside=pages)
    assert not blocks.can_allocate(3, beside=pages)
    blocks.reference(pages)
    assert blocks.can_allocate(2, beside=pages)


def test_a_block_computed_twice_is_kept_once() -> None:
    blocks = BlockManager(4)
    first, second = blocks.allocate(1), blocks.allocate(1)
    assert blocks.register(first[0], key(0), 0) == first[0]
    assert blocks.register(second[0], key(0), 0) == first[0]
    assert blocks.num_free == 3
    blocks.free(first)
    blocks.free(first)
    blocks.check_idle()


def test_reset_forgets_what_no_request_uses() -> None:
    blocks = BlockManager(6)
    chain = cached_chain(blocks, 0, 2)
    lent = blocks.allocate(1)
    blocks.register(lent[0], key(5), 0)
    blocks.pin(lent)
    blocks.free(lent)
    used = blocks.allocate(1)
    blocks.register(used[0], key(6), 0)
    blocks.drain_events()
    assert blocks.reset() == 3
    assert set(blocks.drain_events()[1]) == {key(0), key(1), key(5)}
    assert [blocks.match([k]) for k in (key(0), key(5), key(6))] == [[], [], used]
    blocks.check_integrity()
    blocks.unpin(lent)
    blocks.free(used)
    blocks.check_idle()
    assert len(chain) == 2


def test_giving_back_what_is_not_held_is_a_bug_that_shows() -> None:
    blocks = BlockManager(2)
    with pytest.raises(AssertionError, match="without a reference"):
        blocks.free([0])
    with pytest.raises(AssertionError, match="was not lent"):
        blocks.unpin([0])
    blocks.allocate(1)
    with pytest.raises(AssertionError, match="in use"):
        blocks.check_idle()


def test_integrity_notices_each_way_to_be_wrong() -> None:
    def broken(name: str, value: object) -> BlockManager:
        blocks = BlockManager(4)
        cached_chain(blocks, 0, 2)
        setattr(blocks, name, value)
        return blocks

    for blocks, message in (
        (broken("_blank", [0]), "do not add up"),
        (broken("_blank", [0, 0]), "blank twice"),
        (broken("_page_of", {}), "differ"),
        (broken("num_pinned", 1), "counted as pinned"),
    ):
        with pytest.raises(AssertionError, match=message):
            blocks.check_integrity()
    blocks = broken("_cached", {2, 3})
    blocks._blank = [0, 1]
    with pytest.raises(AssertionError, match="has no key"):
        blocks.check_integrity()


def test_integrity_holds_under_random_use() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        blocks = BlockManager(12)
        held: list[list[int]] = []
        lent: list[list[int]] = []
        for _ in range(300):
            chain = keys(rng.randrange(3) * 100, rng.randint(1, 5))
            hits = blocks.match(chain)
            need = len(chain) - len(hits)
            choice = rng.random()
            if choice < 0.5 and blocks.can_allocate(need, beside=hits):
                blocks.reference(hits)
                pages = hits + blocks.allocate(need)
                held.append(
                    [
                        blocks.register(p, k, i)
                        for i, (p, k) in enumerate(zip(pages, chain, strict=True))
                    ]
                )
            elif choice < 0.8 and held:
                pages = held.pop(rng.randrange(len(held)))
                if rng.random() < 0.5:
                    blocks.pin(pages)
                    lent.append(pages)
                blocks.free(pages)
            elif lent:
                blocks.unpin(lent.pop(rng.randrange(len(lent))))
            blocks.check_integrity()
        for pages in held:
            blocks.free(pages)
        for pages in lent:
            blocks.unpin(pages)
        blocks.check_idle()


def test_many_uses_of_a_cached_block_cost_no_memory() -> None:
    blocks = BlockManager(4)
    pages = cached_chain(blocks, 0, 2)
    for _ in range(100):
        blocks.reference(pages)
        blocks.free(pages)
    assert len(blocks._evictable) <= 4 * 4 + 1
    blocks.drain_events()
    blocks.allocate(4)
    assert blocks.drain_events() == ([], [key(1), key(0)])
