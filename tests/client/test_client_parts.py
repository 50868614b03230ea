import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from kvstore.core.spec import CacheSpec
from kvstore.errors import InvalidArgumentError
from kvstore_client import copying, wire
from kvstore_client.process import this_process


@pytest.mark.parametrize("keys", [b"", [], [b"a" * 32, b"b" * 32], b"a" * 64])
def test_keys_are_joined(keys: list[bytes] | bytes) -> None:
    assert wire.joined_keys(keys) == b"".join([keys] if isinstance(keys, bytes) else keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([b"a" * 31, b"b" * 32], "every key"),
        (b"a" * 33, "multiple of 32"),
        (bytes(32 * (wire.KEYS_MAX + 1)), "65537 keys"),
    ],
)
def test_I7_key_lists_that_cannot_be_sent(keys: list[bytes] | bytes, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        wire.joined_keys(keys)


@pytest.mark.parametrize(("timeout_s", "ms"), [(0, 0), (0.001, 1), (0.5, 450), (5, 4900)])
def test_the_node_is_given_less_time_than_the_caller(timeout_s: float, ms: int) -> None:
    assert wire.wait_ms(timeout_s) == ms


def test_a_spec_travels_whole() -> None:
    spec = CacheSpec.gqa(
        model="m",
        weights_fingerprint="f",
        kv_dtype="float16",
        num_layers=2,
        num_kv_heads=4,
        head_dim=8,
        rope="r",
    )
    message = wire.spec_message(spec)
    assert all(getattr(message, name) == getattr(spec, name) for name in CacheSpec.__slots__)


def test_the_process_names_itself() -> None:
    assert this_process().pid == os.getpid()


@pytest.mark.parametrize("stat", ["", "1 (x) S", "1 (a b) c) " + "word " * 30])
def test_a_proc_that_says_nothing_gives_zeros(tmp_path: Path, stat: str) -> None:
    assert this_process(tmp_path / "none")[1:] == (0, 0)
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").touch()
    (tmp_path / "self/stat").write_text(stat)
    identity = this_process(tmp_path)
    assert identity.pid_namespace > 0
    assert identity.start_ticks == 0


@pytest.mark.parametrize(
    "data",
    [
        bytearray(24),
        np.zeros((2, 3), dtype=np.float32),
        torch.zeros(2, 6, dtype=torch.bfloat16),
        memoryview(bytearray(24)).cast("I"),
    ],
)
def test_any_contiguous_memory_is_taken_without_a_copy(data: object) -> None:
    flat = copying.as_bytes(data, write=True)
    assert flat.nbytes == 24
    flat[:] = 1
    assert copying.as_bytes(data).tolist() == [1] * 24


@pytest.mark.parametrize("data", [b"", np.empty((0, 3)), torch.empty(0)])
def test_nothing_is_no_bytes(data: object) -> None:
    assert len(copying.as_bytes(data)) == 0


@pytest.mark.parametrize(
    "data", [np.zeros((4, 4))[:, 1], torch.zeros(4, 4)[:, 1], "text", torch.empty(1, device="meta")]
)
def test_other_memory_is_refused(data: object) -> None:
    with pytest.raises(InvalidArgumentError, match="contiguous"):
        copying.as_bytes(data)


def test_spans_join_what_lies_together() -> None:
    assert copying.spans(np.array([0, 8, 16, 40, 48, 8], dtype=np.int64), 8) == [
        (0, 3),
        (3, 5),
        (5, 6),
    ]
    assert copying.spans(np.zeros(0, dtype=np.int64), 8) == []


@given(
    nbytes=st.sampled_from([1, 4095, 4096, 5000, 65536, 600_001]),
    places=st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_scatter_and_gather_are_copies_block_by_block(
    nbytes: int, places: list[int], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Three blocks of 65,536 bytes are more than a chunk then, and 600,001 bytes are several.
        patch.setattr(copying, "CHUNK_BYTES", 128 << 10)
        _copied_block_by_block(nbytes, places, seed)


@pytest.mark.parametrize("more", [0, 4096, copying.CHUNK_BYTES // 2 + 1])
def test_scatter_copies_blocks_that_take_several_chunks(more: int) -> None:
    _copied_block_by_block(2 * copying.CHUNK_BYTES + more, [7, 0, 11, 1, 2], seed=1)


def _copied_block_by_block(nbytes: int, places: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    stride = copying.slot_bytes(nbytes)
    pool = np.zeros(12 * stride, dtype=np.uint8)
    offsets = np.array(places, dtype=np.int64) * stride
    data = np.frombuffer(random.bytes(len(places) * nbytes), dtype=np.uint8)
    digests = copying.scatter(pool, offsets, nbytes, data)
    for i, offset in enumerate(offsets.tolist()):
        block = data[i * nbytes : (i + 1) * nbytes].tobytes()
        assert pool[offset : offset + nbytes].tobytes() == block
        assert digests[i] == xxhash.xxh3_64_intdigest(block)
        assert copying.checksum(pool[offset : offset + nbytes]) == digests[i]
    out = np.zeros_like(data)
    copying.gather(pool, offsets, nbytes, out)
    assert np.array_equal(out, data)
