"""F9: damaged files. Right bytes or a miss; never a wrong byte, a crash without a word, or a hang.

Bytes are flipped in the data file, in the index, and in its records with their checksum made right
again; files are cut off at every byte. Each node runs in a child, so that a crash is seen.
"""

import asyncio
import contextlib
import json
import random
import select
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvstore.core.ssd_record import ONE_SHARD_BYTES
from kvstore.core.types import AckLevel
from kvstore.errors import ConfigError
from kvstore.node import fsck as check
from kvstore.node.node import persistent_node_id
from kvstore.node.settings import NodeConfig

from tests.faults import columns
from tests.faults.daemons import daemon_command
from tests.faults.damage import INDEX, KEY_BYTES, KEYS_NAME, Answer, Job
from tests.faults.disk import BLOCK_BYTES, DiskNode
from tests.faults.ledger import Ledger
from tests.faults.report import Record, finish

BLOCKS = 100
REMOVED = 30  # so that there are free pages and free slots
FLIPS = columns.size(quick=2_000, full=20_000, soak=200_000)
DATA_FLIPS, DATA_FLIPS_A_JOB = FLIPS * 6 // 10, 40
RECORD_FLIPS, RECORD_FLIPS_A_JOB = FLIPS * 3 // 10, 20
INDEX_FLIPS = FLIPS - DATA_FLIPS - RECORD_FLIPS
CUTS = columns.size(quick=40, full=2_000, soak=20_000)
ANSWER_TIMEOUT_S = 60.0
PAGE_BYTES = 4096


class Child:
    """The process that opens damaged directories."""

    def __init__(self, folder: Path) -> None:
        command = [*daemon_command("tests.faults.damage"), str(folder)]
        self._errors = open(folder / "errors", "w+")  # noqa: SIM115  (closed with the child)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def do(self, job: Job) -> Answer:
        """AssertionError if the process crashed or hangs over it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_TIMEOUT_S)
        assert ready, f"hangs over {job}"
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(timeout=ANSWER_TIMEOUT_S)
            self._errors.seek(0)
            errors = self._errors.read()[-2000:]
            pytest.fail(f"crashed with {self._process.returncode} over {job}: {errors}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class Damage:
    """A good directory, and what became of its damaged copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = random.Random(columns.SEED)
        self.keys = [self.rng.randbytes(KEY_BYTES) for _ in range(BLOCKS)]
        asyncio.run(self._make())
        self.index = (folder / "good" / INDEX).read_bytes()
        self.places = self._places()
        self.child = Child(folder)
        self.lost = self.wrong = self.refused = 0

    async def _make(self) -> None:
        async with DiskNode(self.folder / "good", Ledger(columns.SEED), **self._settings()) as node:
            for key in self.keys:
                await node.put([key])
            node.remove(self.keys[BLOCKS - REMOVED :])
            await node.idle()
        del self.keys[BLOCKS - REMOVED :]
        (self.folder / KEYS_NAME).write_bytes(b"".join(self.keys))

    def _settings(self) -> dict[str, object]:
        (self.folder / "good").mkdir()
        folder = self.folder / "good"
        return {"data_dir": folder / "node", "ssd_dir": str(folder / "ssd"), "ssd": 1 << 20}

    def _places(self) -> dict[int, int]:
        """Where in the data file each block is."""
        data = (self.folder / "good" / "ssd" / "data").read_bytes()
        ledger = Ledger(columns.SEED)
        places = {}
        for number, key in enumerate(self.keys):
            ledger.issue(key)
            for place in range(0, len(data), BLOCK_BYTES):
                if ledger.read(key, data[place : place + BLOCK_BYTES]):
                    places[number] = place
        assert len(places) == len(self.keys)
        return places

    def do(self, job: Job) -> Answer:
        """Nothing may be wrong; what a node refuses, it refuses with words."""
        answer = self.child.do(job)
        self.wrong += answer["wrong"]
        self.refused += bool(answer["refused"])
        assert answer["stored"] or answer["refused"], f"a node is of no use after {job}"
        return answer

    def flip(self) -> int:
        """What a byte is XORed with."""
        return self.rng.randrange(1, 256)

    def flip_data(self) -> None:
        """1 or 2 bytes in each of some blocks: these are misses, and no others."""
        hit = self.rng.sample(sorted(self.places), DATA_FLIPS_A_JOB)
        flips = [
            (self.places[number] + self.rng.randrange(BLOCK_BYTES), self.flip())
            for number in hit
            for _ in range(self.rng.randint(1, 2))
        ]
        answer = self.do(Job(file="ssd/data", flips=flips))
        assert not answer["refused"], answer
        found = set(answer["found"])
        self.wrong += len(found & set(hit))
        self.lost += len(set(self.places) - set(hit) - found)

    def flip_records(self) -> None:
        """Records that lie about themselves: their key, their place, their size, their bytes."""
        length = KEY_BYTES + ONE_SHARD_BYTES - 8
        hit = self.rng.sample(range(len(self.keys)), RECORD_FLIPS_A_JOB)
        records = [
            (number, [(self.rng.randrange(length), self.flip()) for _ in range(1 + number % 2)])
            for number in hit
        ]
        answer = self.do(Job(records=records))
        assert not answer["refused"], answer
        self.lost += max(0, len(self.keys) - 2 * len(hit) - len(answer["found"]))

    def flip_index(self) -> None:
        """1 or 2 bytes anywhere in the index, half of them where a page says how it is made."""
        page = self.rng.randrange(len(self.index) // PAGE_BYTES) * PAGE_BYTES
        span = self.rng.choice([160, PAGE_BYTES])
        flips = [(page + self.rng.randrange(span), self.flip()) for _ in range(1 + page % 3 % 2)]
        self._judge(self.do(Job(file=INDEX, flips=flips)))

    def cut_index(self, length: int) -> None:
        """The index ends early."""
        self._judge(self.do(Job(file=INDEX, length=length)))

    def cut_data(self, length: int) -> None:
        """The data file ends early: it is refused; repaired, only what was behind is missing."""
        job = Job(file="ssd/data", length=length)
        assert "SSD file" in self.do(job)["refused"]
        answer = self.do(job | Job(repair=True))
        assert not answer["refused"], answer
        whole = {n for n, place in self.places.items() if place + BLOCK_BYTES <= length}
        self.lost += len(whole - set(answer["found"]))

    def _judge(self, answer: Answer) -> None:
        """An index is refused, or gives at least what one page of it does not hold."""
        if answer["refused"]:
            assert "SSD " in answer["refused"], answer
        else:
            assert len(answer["found"]) >= len(self.keys) // 3, "a success that holds nothing"


@pytest.fixture
def damage() -> Iterator[Damage]:
    with tempfile.TemporaryDirectory(prefix="kvs-f09-", dir="/dev/shm") as folder:
        damage = Damage(Path(folder))
        try:
            yield damage
        finally:
            damage.child.close()


@pytest.mark.timeout(columns.size(quick=240, full=2_400, soak=24_000))
def test_I1_I8_F9_damage_is_a_miss_or_a_message(damage: Damage, record_property: Record) -> None:
    answer = damage.do(Job(file=INDEX))
    assert len(answer["found"]) == len(damage.keys)
    for _ in range(DATA_FLIPS // DATA_FLIPS_A_JOB):
        damage.flip_data()
    for _ in range(RECORD_FLIPS // RECORD_FLIPS_A_JOB):
        damage.flip_records()
    for _ in range(INDEX_FLIPS):
        damage.flip_index()
    size = len(damage.index)
    edges = [page + step for page in range(0, size, PAGE_BYTES) for step in (-1, 0, 1)]
    lengths = [n for n in edges if 0 <= n < size] + [
        damage.rng.randrange(size) for _ in range(CUTS)
    ]
    for length in damage.rng.sample(lengths, min(CUTS, len(lengths))):
        damage.cut_index(length)
    for _ in range(CUTS // 4):
        damage.cut_data(damage.rng.randrange(1 << 20))
    counts = {"refused": damage.refused, "lost": damage.lost, "wrong": damage.wrong}
    finish(record_property, "F9 damage", flips=FLIPS, cuts=CUTS + CUTS // 4, **counts)


def test_I11_F9_node_id_cut_off_or_flipped_is_another_or_a_message(tmp_path: Path) -> None:
    config = NodeConfig(data_dir=tmp_path)
    whole = persistent_node_id(config)
    path = tmp_path / "node_id"
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ConfigError, match=r"node_id.* is cut off"):
            persistent_node_id(config)
    for place in range(len(good)):
        for mask in (1, 0x80, 0xFF):
            flipped = bytearray(good)
            flipped[place] ^= mask
            path.write_bytes(flipped)
            with contextlib.suppress(ConfigError):
                assert persistent_node_id(config) != whole, "the index refuses another owner"


async def test_I8_F9_a_flipped_index_is_saved_by_fsck(tmp_path: Path) -> None:
    ledger, rng = Ledger(columns.SEED), random.Random(columns.SEED)
    keys = [rng.randbytes(KEY_BYTES) for _ in range(BLOCKS)]
    async with DiskNode(tmp_path, ledger, ssd=1 << 20) as node:
        for key in keys:
            await node.put([key], AckLevel.SYNCED)
    folder = tmp_path / "node" / "ssd"
    path = folder / "index" / "data.mdb"
    path.write_bytes(bytes(2 * PAGE_BYTES) + path.read_bytes()[2 * PAGE_BYTES :])
    report = check.fsck(folder, repair=True, progress=lambda _done, _total: None)
    assert report.records == BLOCKS
    async with DiskNode(tmp_path, ledger, ssd=1 << 20) as node:
        assert await node.find(keys) == set(keys)
    assert ledger.wrong == 0
