import errno
import os
from pathlib import Path
from random import Random

import lmdb
import pytest
from kvstore.errors import ConfigError, CorruptError
from kvstore.node import ssd_file
from kvstore.node.pool import SharedFile
from kvstore.node.ssd_file import SsdFile
from kvstore.node.ssd_index import SsdIndex

PAGE = 4096
CAPACITY = 4 << 20
POOL = 2 << 20


def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SsdFile(tmp_path, CAPACITY)
    pool = SharedFile(tmp_path / "pool-x", 16 * PAGE)
    memory = pool.map.memory
    memory[: 4 * PAGE] = data = os.urandom(4 * PAGE)
    halves = [memory[: 2 * PAGE], memory[2 * PAGE : 4 * PAGE]]
    real_write, real_read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, b, o: real_write(fd, [b[0][:PAGE]], o))
    file.write(halves, PAGE)
    memory[: 4 * PAGE] = bytes(4 * PAGE)
    monkeypatch.setattr(os, "preadv", lambda fd, b, o: real_read(fd, [b[0][:PAGE]], o))
    file.read(halves, PAGE)
    assert bytes(memory[: 4 * PAGE]) == data
    monkeypatch.setattr(os, "pwritev", lambda _fd, _b, _o: 0)
    with pytest.raises(OSError, match="took no bytes"):
        file.write(halves, 0)
    file.close()
    memory.release()
    pool.close()


def test_file_keeps_to_its_capacity(tmp_path: Path) -> None:
    SsdFile(tmp_path, CAPACITY).close()
    path = tmp_path / ssd_file.DATA_NAME
    assert path.stat().st_size == CAPACITY
    assert path.stat().st_blocks * 512 >= CAPACITY
    SsdFile(tmp_path, CAPACITY // 2).close()
    assert path.stat().st_size == CAPACITY // 2
    with pytest.raises(ConfigError, match="--ssd"):
        SsdFile(tmp_path, 1 << 55)
    path.chmod(0)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="SSD file"):
        SsdFile(tmp_path, CAPACITY)


def test_file_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        file = SsdFile(tmp_path, CAPACITY)
    assert not file.direct
    file.close()


def test_probe_falls_back_where_the_pool_cannot_be_read_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SsdFile(tmp_path, CAPACITY)
    page = memoryview(bytearray(PAGE))

    def refuse(_fd: int, _buffers: object, _offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", refuse)
    code = errno.EINVAL
    file.probe(page)
    assert not file.direct
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        file.probe(page)
    file.close()


def test_index_belongs_to_one_node_and_format(tmp_path: Path) -> None:
    SsdIndex(tmp_path, CAPACITY // PAGE, "node-1").close()
    with pytest.raises(ConfigError, match="node_id node-1"):
        SsdIndex(tmp_path, CAPACITY // PAGE, "node-2")
    env = lmdb.open(str(tmp_path / "index"), max_dbs=3)
    with env.begin(write=True, db=env.open_db(b"meta")) as txn:
        txn.put(b"format_version", b"99")
    env.close()
    with pytest.raises(ConfigError, match=r"format version 99.*reads version 2.*newer"):
        SsdIndex(tmp_path, CAPACITY // PAGE, "node-1")


def test_I8_pages_that_a_large_removal_never_wrote_are_no_loss(tmp_path: Path) -> None:
    random = Random(8_300_003)
    keys = [random.randbytes(32) for _ in range(8300)]
    index = SsdIndex(tmp_path, 1 << 16, "node-1")
    index.apply([(key, bytes(112)) for key in keys])
    index.apply([(key, None) for key in keys])
    assert index.lost() == ""
    index.close()
    index = SsdIndex(tmp_path, 1 << 16, "node-1")
    assert index.lost() == ""
    index.close()


def test_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "data.mdb").write_bytes(b"\1" * 8192)
    with pytest.raises(CorruptError, match="SSD index"):
        SsdIndex(tmp_path, CAPACITY // PAGE, "node-1")
