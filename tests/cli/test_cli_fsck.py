"""``kvstore fsck`` on directories made here."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import xxhash
from kvstore.cli import fsck as command
from kvstore.cli.main import main
from kvstore.core.keys import namespace_root
from kvstore.core.spec import CacheSpec
from kvstore.core.ssd_record import NO_PARENT, SsdRecord
from kvstore.core.types import Namespace
from kvstore.node import translate
from kvstore.node.dir_lock import DirectoryLock
from kvstore.node.ssd_file import SsdFile
from kvstore.node.ssd_index import SsdIndex

BLOCK = 8192
BLOCKS = 30
FILE_BYTES = 1 << 20
SPEC = CacheSpec.raw("tests", block_bytes=BLOCK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with one chain."""
    folder = tmp_path / "ssd"
    folder.mkdir()
    index = SsdIndex(folder, BLOCKS, "node-1")
    SsdFile(folder, FILE_BYTES).close()
    index.note_data_bytes(FILE_BYTES)
    root = namespace_root(SPEC)
    namespace = Namespace(1, 1, root, BLOCK, SPEC, "default")
    index.add_namespace(root, translate.namespace_to_message(namespace).SerializeToString())
    parent = NO_PARENT
    with open(folder / "data", "r+b") as file:
        for number in range(BLOCKS):
            data, key = os.urandom(BLOCK), os.urandom(32)
            file.write(data)
            proof = (xxhash.xxh3_64_intdigest(data),)
            record = SsdRecord(key, root, parent, BLOCK, number * BLOCK, proof, number + 1)
            index.apply([(key, record.encode())])
            parent = key
    index.close()
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["fsck", *arguments])
    return int(ended.value.code or 0)


def damage(folder: Path, block: int) -> None:
    with open(folder / "data", "r+b") as file:
        file.seek(block * BLOCK)
        file.write(b"wrong")


def test_clean(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder)) == 0
    captured = capsys.readouterr()
    assert captured.out == f"clean: {BLOCKS} records, 240 KiB read.\n"
    assert captured.err == ""
    assert run(str(folder), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["clean"], report["records"], report["findings"]) == (True, BLOCKS, [])


def test_problems_are_listed_then_repaired(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder, 1)
    assert run(str(folder)) == 1
    out = capsys.readouterr().out
    assert "corrupt" in out
    assert "… and 9 more" in out
    assert "29 records bad" in out
    assert "--repair" in out
    assert run(str(folder), "--repair", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["repaired"]
    assert report["faults"] == {"corrupt": 1, "orphan": 28}
    assert len(bytes.fromhex(report["findings"][0]["key"])) == 32
    assert run(str(folder)) == 0
    assert "1 record, 8 KiB read" in capsys.readouterr().out


def test_repair_says_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folder / "data", FILE_BYTES // 2)
    assert run(str(folder), "--repair") == 1
    out = capsys.readouterr().out
    assert "The data file is 512 KiB; its node made it with 1 MiB." in out
    assert "0 records dropped" in out
    (folder / "data").unlink()
    SsdIndex(folder, BLOCKS, "node-1").close()
    assert run(str(folder), "--repair") == 1
    assert "30 records dropped" in capsys.readouterr().out
    assert run(str(folder)) == 0


def test_refusals_exit_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "DIR" in capsys.readouterr().err
    assert run(str(folder.parent)) == 2
    assert "--ssd-dir" in capsys.readouterr().err
    lock = DirectoryLock(folder)
    assert run(str(folder), "--repair") == 2
    assert capsys.readouterr().err == (
        f"kvstore: {folder} is in use by a running node; stop the node first\n"
    )
    lock.release()
    assert run(str(folder)) == 0


def test_a_broken_index_exits_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folder / "index" / "data.mdb", 3 * 4096)
    assert run(str(folder)) == 1
    assert f"kvstore fsck {folder} --repair" in capsys.readouterr().err
    assert run(str(folder), "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["clean"], report["repaired"]) == (False, False)
    assert f"SSD index {folder / 'index'}: page " in report["index_damage"]
    assert (report["data_bytes"], report["data_bytes_noted"]) == (FILE_BYTES, None)
    assert run(str(folder), "--repair") == 1
    out = capsys.readouterr().out
    assert "A new index was made of" in out
    assert "kept as index/data.mdb.damaged" in out
    assert run(str(folder)) == 0


def test_a_terminal_gets_a_bar(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(command._progress())
        progress(1, 2)
    assert "reading" in capsys.readouterr().err
