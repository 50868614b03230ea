"""The mark of an index on the medium: no repair loses a block by one that is not the newest."""

from pathlib import Path

import lmdb
import numpy as np
import pytest
from kvstore.core.fsck import Fault, count_faults
from kvstore.core.ssd_mark import Mark
from kvstore.core.ssd_record import SsdRecord
from kvstore.node.ssd_index import SsdIndex

from tests.node.ssd_directory import PAGE, SLOTS, Directory, mark_in, run


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "ssd")


def forget_the_mark(folder: Path) -> None:
    """Makes of an index one of a version that knew no marks."""
    env = lmdb.open(str(folder / "index"), max_dbs=3)
    with env.begin(write=True, db=env.open_db(b"meta")) as txn:
        assert txn.delete(b"sequences")
    env.close()


def test_I8_a_repair_keeps_the_mark(directory: Directory) -> None:
    for number in range(9):
        directory.write(number, number, number + 1)
    directory.remove(range(5, 9))
    directory.lose_the_root()
    run(directory.path, repair=True)
    assert mark_in(directory.path).sequence == 9


def test_I8_records_that_a_repair_drops_count_in_an_index_without_a_mark(
    directory: Directory,
) -> None:
    for number in range(9):
        directory.write(number, number, number + 1)
    directory.data.seek(8 * PAGE)
    directory.data.write(b"wrong")
    directory.index.close()
    directory.data.close()
    forget_the_mark(directory.path)
    assert count_faults(run(directory.path, repair=True).findings) == {Fault.CORRUPT: 1}
    assert mark_in(directory.path) == Mark(10, 1)


def test_a_mark_with_a_flipped_byte_is_as_none(
    directory: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    directory.write(0, 0, 7)
    directory.index.close()
    directory.data.close()
    path = directory.path / "index" / "data.mdb"
    good = Mark(7, 0).encode()
    assert good in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(good, good[:-1] + b"?"))
    assert run(directory.path).clean
    assert "mark" in caplog.text


def start_again(directory: Directory) -> None:
    """Opens the index as a node does that starts."""
    directory.index.close()
    directory.index = SsdIndex(directory.path, SLOTS, "node-1")
    values = zip(*directory.index.entries(), strict=True)
    sequences = [SsdRecord.decode(key, value).sequence for key, value in values]
    directory.index.go_on_after(np.array(sequences, dtype=np.int64))


@pytest.mark.parametrize("removed", [0, 1, 10])
def test_I8_a_mark_from_before_an_older_version_wrote_costs_no_block(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    for number in range(100):
        directory.write(number, number, number + 1)
    directory.remove(range(100))
    with monkeypatch.context() as older:  # it begins again, and keeps no mark
        older.setattr(Mark, "after", lambda mark, *_, **__: mark)
        for number in range(1000, 1050):
            directory.write(number, number - 1000, number - 999)
    start_again(directory)
    directory.remove(range(1000, 1000 + removed))
    directory.lose_the_root()
    run(directory.path, repair=True)
    assert directory.kept().keys() >= set(range(1000 + removed, 1050))


@pytest.mark.parametrize("removed", [0, 1, 10])
def test_I8_the_mark_of_a_purge_that_was_not_committed_costs_no_block(
    directory: Directory, removed: int
) -> None:
    path = directory.path / "index" / "data.mdb"
    for number in range(100):
        directory.write(number, number, number + 1)
    metas = path.read_bytes()[: 2 * PAGE]
    directory.remove(range(100))
    with open(path, "r+b") as file:  # power fails: the pages are written, the root is not
        file.write(metas)
    start_again(directory)
    directory.remove(range(removed))
    directory.lose_the_root()
    run(directory.path, repair=True)
    assert directory.kept().keys() >= set(range(removed, 100))


@pytest.mark.parametrize("refusal", [lmdb.MapFullError("full"), lmdb.Error("Input/output error")])
def test_an_index_that_takes_no_mark_now_is_opened(
    directory: Directory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refusal: lmdb.Error,
) -> None:
    def refuse(*_: object) -> None:
        raise refusal

    directory.write(0, 0, 7)
    with monkeypatch.context() as patched:
        patched.setattr(SsdIndex, "apply", refuse)
        start_again(directory)
    assert "mark" in caplog.text
    directory.remove([])
    directory.index.close()
    directory.data.close()
    assert mark_in(directory.path) == Mark(8, 7)


def test_a_check_notes_no_mark(directory: Directory) -> None:
    directory.write(0, 0, 7)
    directory.index.close()
    directory.data.close()
    assert run(directory.path).clean
    assert mark_in(directory.path) == Mark(7, 0)
