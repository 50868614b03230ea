"""Settings, pages, wake-ups and the like."""

import dataclasses
import os
import select
import threading
from typing import Any

import numpy as np
import pytest
from kvstore.errors import ConfigError, InvalidArgumentError
from kvstore_connector.config import ConnectorConfig, parse_transfer_config
from kvstore_connector.hbm import HbmBlocks
from kvstore_connector.outbox import FinishedLoad, Outbox
from kvstore_connector.pages import PageRows
from kvstore_connector.saves import _yield_to_others


def transfer(**extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": "KVStoreConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"node": "unix:/n.sock", **extra},
    }


def test_settings_come_from_the_transfer_config() -> None:
    config = parse_transfer_config(transfer(save_queue_bytes="1MiB", load_timeout_s=3))
    assert config == ConnectorConfig("unix:/n.sock", save_queue_bytes=1 << 20, load_timeout_s=3.0)
    assert config.loads
    assert config.saves
    assert not dataclasses.replace(config, role="kv_consumer").saves
    assert not dataclasses.replace(config, role="kv_producer").loads
    assert config.load_seconds(512 << 20) == 5.0


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"kv_role": "kv_both"}, "node"),
        (transfer(nod="x"), "nod"),
        (transfer(node="bogus"), "node is 'bogus'; write it like unix:"),
        (transfer(node="unix:"), "node is 'unix:'"),
        (transfer(node=":9400"), "node is ':9400'"),
        (transfer(node="host:0"), "node is 'host:0'"),
        (transfer(node="host:70000"), "node is 'host:70000'"),
        (transfer(node="unix:/" + "a" * 107), "has 108 bytes"),
        (transfer(load_timeout_s="fast"), "load_timeout_s"),
        (transfer(min_load_blocks=True), "min_load_blocks"),
        (transfer(min_load_blocks=0), "min_load_blocks"),
        (transfer(save_timeout_s=0), "save_timeout_s"),
        (transfer(save_queue_bytes="much"), "size"),
        (transfer(save_queue_bytes=1.5), "save_queue_bytes"),
        ({**transfer(), "kv_role": "both"}, "kv_role"),
        ({**transfer(), "kv_port": 1}, "kv_port"),
        ({**transfer(), "kv_load_failure_policy": "fail"}, "kv_load_failure_policy"),
        ({**transfer(), "kv_connector_extra_config": []}, "kv_connector_extra_config"),
    ],
)
def test_wrong_settings_are_refused_by_name(table: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_transfer_config(table)


def test_pages_that_follow_each_other_are_one_piece() -> None:
    pages = PageRows(np.arange(40, dtype=np.uint8).reshape(10, 4), 4)
    pieces = [piece.tolist() for piece in pages.spans([2, 3, 7, 6, 0, 1])]
    assert pieces == [list(range(8, 16)), [28, 29, 30, 31], [24, 25, 26, 27], list(range(8))]
    assert list(pages.spans([])) == []
    assert pages.row(1).tolist() == [4, 5, 6, 7]


def test_pieces_are_the_memory_of_the_pages() -> None:
    rows = np.zeros((4, 8), np.uint8)
    next(PageRows(rows, 8).spans([1, 2]))[:] = 7
    assert rows.sum(1).tolist() == [0, 56, 56, 0]


@pytest.mark.parametrize("rows", [np.zeros((4, 7), np.uint8), np.zeros((4, 16), np.uint8)[:, ::2]])
def test_pages_of_another_shape_are_refused(rows: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="contiguous"):
        PageRows(rows, 8)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_the_outbox_wakes_once_and_loses_nothing() -> None:
    outbox = Outbox()
    assert not readable(outbox.fd)
    outbox.put_pages([])
    assert not readable(outbox.fd)
    load = FinishedLoad("r", 1, "complete", {})
    outbox.put_load(load)
    outbox.put_pages([3])
    assert readable(outbox.fd)
    finished = outbox.drain()
    assert (finished.loads, finished.pages) == ([load], [3])
    assert not readable(outbox.fd)
    assert outbox.drain().loads == []
    outbox.put_pages([4])
    outbox.close()
    outbox.close()
    outbox.put_pages([5])
    assert outbox.drain().pages == [4, 5]


def test_what_nobody_is_told_takes_no_memory() -> None:
    hbm = HbmBlocks()
    for number in range(1000):
        hbm.change([bytes([number % 256]) * 32], [bytes([(number - 1) % 256]) * 32])
    assert len(hbm._changed) == 0
    assert hbm.take() == ([bytes([999 % 256]) * 32], [], True)
    hbm.change([b"a" * 32], [])
    hbm.lost()
    assert len(hbm._changed) == 0
    hbm.change([b"b" * 32], [bytes([999 % 256]) * 32])
    assert sorted(hbm.take()[0]) == [b"a" * 32, b"b" * 32]


def test_hbm_changes_are_told_once_and_in_their_last_state() -> None:
    hbm = HbmBlocks()
    hbm.change([b"a", b"b"], [])
    assert hbm.leading([b"b", b"a", b"c"]) == 2
    assert hbm.leading([b"a"]) == 1
    stored, removed, cleared = hbm.take()
    assert (sorted(stored), removed, cleared) == ([b"a", b"b"], [], True)
    hbm.change([b"c"], [b"a"])
    hbm.change([], [b"c"])
    hbm.change([b"a"], [])
    stored, removed, cleared = hbm.take()
    assert (stored, removed, cleared) == ([b"a"], [b"c"], False)
    assert hbm.take() == ([], [], False)
    hbm.lost()
    stored, removed, cleared = hbm.take()
    assert (sorted(stored), removed, cleared) == ([b"a", b"b"], [], True)


def test_saving_threads_step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def run() -> None:
        _yield_to_others()
        tid = threading.get_native_id()
        seen.append((os.getpriority(os.PRIO_PROCESS, tid), os.sched_getscheduler(tid)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(19, os.SCHED_BATCH)]
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19

    def refuse(*_: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    _yield_to_others()
