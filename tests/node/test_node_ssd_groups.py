"""Writes and removals of the SSD tier become durable in groups."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from kvstore.core.effects import DropSsd
from kvstore.node import ssd_writer

from tests.node.ssd_rig import PAGE, Rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


async def test_a_removal_goes_with_the_group_that_is_being_written(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rig.write(0, os.urandom(PAGE), 0)
    rig.tier.submit_writes([first])
    await rig.drain()
    writing, go_on, commits = threading.Event(), threading.Event(), []
    real_write, real_apply = rig.file.write, rig.index.apply

    def write(buffers: Sequence[memoryview], offset: int) -> None:
        writing.set()
        assert go_on.wait(20)
        real_write(buffers, offset)

    def apply(changes: Sequence[tuple[bytes, bytes | None]], sequence: int) -> None:
        commits.append([key for key, _ in changes])
        real_apply(changes, sequence)

    monkeypatch.setattr(rig.file, "write", write)
    monkeypatch.setattr(rig.index, "apply", apply)
    second = rig.write(1, os.urandom(PAGE), PAGE)
    rig.tier.submit_writes([second])
    assert await asyncio.to_thread(writing.wait, 20)
    rig.tier.submit_drops([DropSsd(0, first.key, 0)])
    go_on.set()
    await rig.drain()
    assert commits == [[first.key, second.key]]
    assert rig.index.entries() == ([second.key], [second.record.encode()])


async def test_a_long_list_of_writes_becomes_durable_group_by_group(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_writer, "GROUP_BYTES", PAGE)  # more groups than may be begun at a time
    syncs = []
    real_sync = rig.file.sync

    def sync() -> None:
        syncs.append(1)
        real_sync()

    monkeypatch.setattr(rig.file, "sync", sync)
    ops = [rig.write(row, os.urandom(PAGE), 2 * row * PAGE) for row in range(10)]
    rig.tier.submit_writes(ops)
    await rig.drain()
    assert rig.reports.kept == ops
    assert len(syncs) > 1


async def test_I2_a_group_waits_for_the_one_before_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_writer, "GROUP_BYTES", PAGE)
    real_write, go_on, second_written = rig.file.write, threading.Event(), threading.Event()

    def write(buffers: Sequence[memoryview], offset: int) -> None:
        if not offset:
            assert go_on.wait(20)
        real_write(buffers, offset)
        if offset:
            second_written.set()

    monkeypatch.setattr(rig.file, "write", write)
    ops = [rig.write(row, os.urandom(PAGE), 2 * row * PAGE) for row in range(2)]
    rig.tier.submit_writes(ops)
    assert await asyncio.to_thread(second_written.wait, 20)
    assert rig.index.entries() == ([], [])
    go_on.set()
    await rig.drain()
    assert rig.reports.kept == ops
