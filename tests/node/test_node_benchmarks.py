"""The benchmarks of a node, with sizes at which they only have to run."""

import os
from pathlib import Path

import pytest

from benchmarks import burst, checks, local, restart, ssd
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Row
from benchmarks.io_uring import Ring
from benchmarks.prompts import Prompts
from benchmarks.raw_disk import RawDisk, Requests

MIB = 1 << 20


def by_metric(rows: list[Row]) -> dict[str, Row]:
    return {row.metric: row for row in rows}


@pytest.fixture
def small_ssd(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"DRAM_BYTES": 16, "SSD_BYTES": 96, "READ_BYTES": 32, "WRITE_BYTES": 16}
    sizes |= {"READ_PROMPT_BYTES": 2, "WRITE_PROMPT_BYTES": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(ssd, name, value * MIB)
    monkeypatch.setattr(ssd, "BLOCK_SIZES", {"64KiB": 64 << 10})


def test_ssd(small_ssd: None) -> None:
    rows = by_metric(ssd.run(1))
    assert {"ssd_read_64KiB", "ssd_write_64KiB", "ssd_read_64KiB_cpu"} <= set(rows)
    assert all(rows[f"ssd_{kind}_64KiB"].ratio is not None for kind in ("read", "write"))


def test_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burst, "DRAM_BYTES", 4 * MIB)
    monkeypatch.setattr(burst, "SSD_BYTES", 64 * MIB)
    monkeypatch.setattr(burst, "BLOCKS", 256)
    monkeypatch.setattr(burst, "BLOCK_BYTES", 64 << 10)
    monkeypatch.setattr(burst, "PROMPT_BLOCKS", 8)
    rows = by_metric(burst.run(1))
    assert rows["kept"].value == 256
    assert rows["refused"].value == 0


def test_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "BLOCKS", 2000)
    monkeypatch.setattr(restart, "DRAM_BYTES", 16 * MIB)
    monkeypatch.setattr(restart, "MEMORY_BLOCKS", 4000)
    rows = by_metric(restart.run(1))
    assert rows["found"].value == 2000
    assert rows["ready_s"].value > 0
    assert rows["node_bytes_per_block"].value > 0


def test_checks(small_ssd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BATCH_BYTES", 2 * MIB)
    monkeypatch.setattr(local, "POOL_BATCHES", 8)
    monkeypatch.setattr(local, "ROUND_BATCHES", 4)
    rows = by_metric(checks.run(1))
    assert {"checks_get", "checks_get_64KiB", "checks_get_ssd"} == set(rows)


def test_a_block_with_other_bytes_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prompts, "right", lambda *_: 0)
    monkeypatch.setattr(burst, "BLOCKS", 8)
    monkeypatch.setattr(burst, "SSD_BYTES", 64 * MIB)
    with pytest.raises(BenchmarkError, match="other bytes"):
        burst.run(1)


@pytest.mark.parametrize("through", ["threads", "io_uring"])
def test_the_loops_move_what_is_there(tmp_path: Path, through: str) -> None:
    if through == "io_uring":
        try:
            Ring(1).close()
        except OSError as error:
            pytest.skip(f"io_uring is not to be had here: {error.strerror}")
    path = tmp_path / "data"
    content = os.urandom(3 * MIB)
    path.write_bytes(content)
    disk = RawDisk(path, 3 * MIB)
    requests = Requests(0, 3 * MIB, MIB, 2, MIB)
    ring = through == "io_uring"
    assert (disk.read_ring if ring else disk.read)(requests) > 0
    assert bytes(disk.memory) == content
    disk.memory[:4096] = bytes(4096)
    assert (disk.write_ring if ring else disk.write)(requests) > 0
    disk.close()
    assert path.read_bytes() == bytes(4096) + content[4096:]
