"""What of the pool a start got in small pages becomes huge ones behind the node's work."""

import asyncio
import errno
import logging
import mmap
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kvstore.node import huge_pages
from kvstore.node.huge_pages import HugePages
from kvstore.node.metrics import node_registry
from kvstore.node.pool import SharedFile
from kvstore.shared_memory import HUGE_PAGE_BYTES, MADV_COLLAPSE, SharedMap, advise

from tests.node.rig import LocalNode

PAGES = 32


@pytest.fixture
def small_pool() -> Iterator[SharedFile]:
    """A pool as it is after a start."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = SharedFile(
            Path(folder) / "pool-1", PAGES * HUGE_PAGE_BYTES + mmap.PAGESIZE, touch=False
        )
        file.wait_taken()
        yield file
        file.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("START_AFTER_S", "PASS_EVERY_S"):
        monkeypatch.setattr(huge_pages, name, 0.001)
    monkeypatch.setattr(huge_pages, "SHARE", 1.0)


class Kernel:
    """Answers each request as a function of its number says."""

    def __init__(self, answer: Callable[[int], int]) -> None:
        self.asked: list[int] = []
        self._answer = answer

    def __call__(self, address: int, nbytes: int, advice: int) -> int:
        assert (nbytes, advice) == (HUGE_PAGE_BYTES, MADV_COLLAPSE)
        self.asked.append(address)
        return self._answer(len(self.asked) - 1)


class Pauses(threading.Event):
    """Notes how long somebody would wait, who waits no time at all."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_s: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked_s.append(timeout or 0.0)
        return super().wait(0)


def run_until_ended(file: SharedFile, pauses: Pauses | None = None) -> HugePages:
    huge = HugePages(file)
    huge._stop = pauses or Pauses()
    huge.start()
    huge._thread.join(30)
    assert not huge._thread.is_alive()
    return huge


def test_all_of_it_is_noted_as_small(small_pool: SharedFile) -> None:
    assert HugePages(small_pool).small_bytes == PAGES * HUGE_PAGE_BYTES


def test_bytes_stay_while_another_mapping_writes_them(small_pool: SharedFile) -> None:
    if advise(small_pool.map.address, HUGE_PAGE_BYTES, MADV_COLLAPSE) == errno.EINVAL:
        pytest.skip("this kernel makes no huge pages of shared memory")
    with open(small_pool.path, "r+b") as file:
        clients = SharedMap(file.fileno(), small_pool.size_bytes)
    memory = clients.memory
    kept = random.Random(7).randbytes(len(memory) // 2)
    memory[: len(kept)] = kept
    ended, rounds = threading.Event(), 0

    def write() -> None:
        nonlocal rounds
        while not ended.is_set() or not rounds:
            rounds += 1
            memory[len(kept) :] = bytes([rounds % 256]) * (len(memory) - len(kept))

    writer = threading.Thread(target=write)
    writer.start()
    huge = HugePages(small_pool)
    huge.start()
    huge._thread.join(30)
    ended.set()
    writer.join()
    huge.close()
    assert huge.small_bytes < PAGES * HUGE_PAGE_BYTES
    assert small_pool.map.memory == memory
    assert memory[: len(kept)] == kept
    assert set(memory[len(kept) :]) == {rounds % 256}
    clients.close()


def test_what_is_pinned_is_asked_for_again(
    small_pool: SharedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(lambda number: errno.EAGAIN if number in (3, 5, PAGES) else 0)
    monkeypatch.setattr(huge_pages, "advise", kernel)
    assert run_until_ended(small_pool).small_bytes == 0
    start = small_pool.map.address
    pages = [(address - start) // HUGE_PAGE_BYTES for address in kernel.asked]
    assert pages == [*range(PAGES), 3, 5, 3]


@pytest.mark.parametrize(
    ("code", "asked"), [(errno.ENOMEM, 16), (errno.EBUSY, 16), (errno.EAGAIN, PAGES)]
)
def test_a_pass_ends_where_no_memory_is_found_and_others_come_later(
    code: int, asked: int, small_pool: SharedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "PASS_EVERY_S", 5.0)
    passes = 9
    kernel = Kernel(lambda number: code if number < passes * asked else 0)
    monkeypatch.setattr(huge_pages, "advise", kernel)
    pauses = Pauses()
    assert run_until_ended(small_pool, pauses).small_bytes == 0
    assert len(kernel.asked) == passes * asked + PAGES
    between_passes = [pause for pause in pauses.asked_s if pause >= 5.0]
    assert between_passes == [10, 20, 40, 80, 160, 320, 600, 600, 600]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_kernel_that_makes_none_is_asked_no_more(
    code: int,
    small_pool: SharedFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    kernel = Kernel(lambda _: code)
    monkeypatch.setattr(huge_pages, "advise", kernel)
    assert run_until_ended(small_pool).small_bytes == PAGES * HUGE_PAGE_BYTES
    assert len(kernel.asked) == PAGES
    assert errno.errorcode[code] in caplog.text


def test_one_refusal_says_nothing_of_the_others(
    small_pool: SharedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(number: int) -> int:
        if number >= PAGES:
            return 0
        return errno.EINVAL if number == PAGES - 1 else errno.EAGAIN

    kernel = Kernel(answer)
    monkeypatch.setattr(huge_pages, "advise", kernel)
    assert run_until_ended(small_pool).small_bytes == 0
    assert len(kernel.asked) == 2 * PAGES


def test_it_ends_in_the_middle_of_a_pass(
    small_pool: SharedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def answer(_number: int) -> int:
        asked.set()
        return 0

    kernel = Kernel(answer)
    monkeypatch.setattr(huge_pages, "advise", kernel)
    monkeypatch.setattr(huge_pages, "SHARE", 1e-9)  # the pause after the first never ends
    huge = HugePages(small_pool)
    huge.start()
    assert asked.wait(10)
    huge.close()
    assert len(kernel.asked) == 1
    huge.close()


def test_for_less_than_a_huge_page_no_thread_is_started(tmp_path: Path) -> None:
    file = SharedFile(tmp_path / "pool-1", HUGE_PAGE_BYTES - mmap.PAGESIZE, touch=False)
    file.wait_taken()
    huge = HugePages(file)
    huge.start()
    assert huge._thread.ident is None
    huge.close()
    file.close()


async def test_a_node_shows_what_is_left(
    make_node: Callable[..., LocalNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "advise", Kernel(lambda _: errno.EAGAIN))
    node = make_node(dram=8 * HUGE_PAGE_BYTES)
    await node.start()
    name = "kvstore_node_pool_small_pages_bytes"
    shown = await asyncio.to_thread(node_registry(node.node).get_sample_value, name)
    assert shown in (8 * HUGE_PAGE_BYTES, 7 * HUGE_PAGE_BYTES)  # one may be in hand
