"""A process that opens damaged SSD directories, one after the other, and says what it found.

``python -m tests.faults.damage DIR``: ``DIR/good`` has a directory that a node left. One job a line
on stdin, one answer a line on stdout: a crash is a line that never comes.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import lmdb
import xxhash
from kvstore.core.ssd_record import PROOF_BYTES
from kvstore.core.types import AckLevel
from kvstore.errors import KVStoreError
from kvstore.node.fsck import fsck

from tests.faults import columns
from tests.faults.disk import DiskNode, reached
from tests.faults.ledger import Ledger

KEYS_NAME = "keys"
INDEX = "ssd/index/data.mdb"
KEY_BYTES = 32


class Job(TypedDict, total=False):
    """What is done to a copy of the good directory."""

    file: str
    flips: list[tuple[int, int]]  # place, and what is XORed
    length: int
    repair: bool  # whether `kvstore fsck --repair` comes before the node
    records: list[tuple[int, list[tuple[int, int]]]]  # which, and flips of key and value together


class Answer(TypedDict):
    """How the node got on: refused with a message, or the numbers of the blocks that it had."""

    refused: str
    found: list[int]
    wrong: int
    stored: bool


def change(data: bytearray, flips: Sequence[tuple[int, int]]) -> None:
    """XORs single bytes."""
    for place, mask in flips:
        data[place % len(data)] ^= mask


def _damage(folder: Path, job: Job) -> None:
    if "records" in job:
        _damage_records(folder / "ssd" / "index", job["records"])
        return
    path = folder / job["file"]
    with open(path, "r+b") as file:
        for place, mask in job.get("flips", ()):
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ mask]))
        if "length" in job:
            file.truncate(job["length"])


def _damage_records(index: Path, records: list[tuple[int, list[tuple[int, int]]]]) -> None:
    """Flips in records whose checksum is then made right again."""
    env = lmdb.open(str(index), max_dbs=3, map_size=1 << 28)
    with env.begin(write=True, db=env.open_db(b"blocks")) as txn:
        entries = list(txn.cursor())
        for number, flips in records:
            key, value = entries[number % len(entries)]
            both = bytearray(key + value[:-PROOF_BYTES])
            change(both, flips)
            proof = xxhash.xxh3_64_intdigest(bytes(both)).to_bytes(PROOF_BYTES, "little")
            txn.delete(key)
            txn.put(bytes(both[:KEY_BYTES]), bytes(both[KEY_BYTES:]) + proof)
    env.close()


async def _look(folder: Path, keys: list[bytes], turn: int) -> Answer:
    """Starts a node, reads every block, stores some, and reads these too."""
    ledger = Ledger(columns.SEED)
    for key in keys:
        ledger.issue(key)
    try:
        places = {"pool_dir": folder.parent, "ssd_dir": str(folder / "ssd")}
        node = DiskNode(folder, ledger, ssd=1 << 20, **places)
    except KVStoreError as error:
        return Answer(refused=str(error), found=[], wrong=0, stored=False)
    async with node:
        found = await node.find(keys)
        new = [b"%32d" % (turn * 8 + i) for i in range(8)]
        outcomes = [await node.put([key]) for key in new]
        stored = all(reached(outcome, AckLevel.SYNCED) for outcome in outcomes)
        node.forget_dram()
        stored &= await node.find(new) == set(new)
        await node.idle()
    numbers = [number for number, key in enumerate(keys) if key in found]
    return Answer(refused="", found=numbers, wrong=ledger.wrong, stored=stored)


def main() -> None:
    """Answers jobs until stdin ends."""
    folder = Path(sys.argv[1])
    good, copy = folder / "good", folder / "copy"
    raw = (folder / KEYS_NAME).read_bytes()
    keys = [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]
    for turn, line in enumerate(sys.stdin):
        job: Any = json.loads(line)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        _damage(copy, job)
        if job.get("repair"):
            fsck(copy / "ssd", repair=True, progress=lambda _done, _total: None)
        answer = asyncio.run(_look(copy, keys, turn))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
