"""Block identity: keys, roots, specs."""

import hashlib
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kvstore.core.distinct import distinct
from kvstore.core.keys import (
    block_keys,
    holds_key,
    join_keys,
    namespace_root,
    salt_extra,
    split_keys,
)
from kvstore.core.spec import CacheSpec
from kvstore.errors import InvalidArgumentError

SPEC = CacheSpec.gqa(
    model="m",
    weights_fingerprint="f",
    kv_dtype="float16",
    num_layers=2,
    num_kv_heads=4,
    head_dim=8,
    rope="theta=1e4",
)
ROOT = namespace_root(SPEC)


def test_keys_are_the_chain_that_the_design_states() -> None:
    tokens = list(range(130))
    keys = block_keys(ROOT, tokens, 64)
    first = hashlib.sha256(ROOT + struct.pack("<64I", *tokens[:64])).digest()
    second = hashlib.sha256(first + struct.pack("<64I", *tokens[64:128])).digest()
    assert keys == [first, second]
    assert block_keys(ROOT, np.array(tokens), 64) == keys
    assert block_keys(ROOT, tokens[64:], 64, parent=first, first_block=1) == [second]


def test_extra_keys_change_their_block_and_all_behind_it() -> None:
    tokens = list(range(192))
    plain = block_keys(ROOT, tokens, 64)
    mixed = block_keys(ROOT, tokens, 64, {1: (b"lora",)})
    assert [a == b for a, b in zip(plain, mixed, strict=True)] == [True, False, False]
    assert block_keys(ROOT, tokens, 64, {1: (b"lo", b"ra")})[1] != mixed[1]
    assert block_keys(ROOT, tokens, 64, salt_extra("s"))[0] != plain[0]
    assert salt_extra(None) == {}
    assert len(block_keys(ROOT, tokens, 64, {1: ()}, first_block=1)) == 3


@pytest.mark.parametrize(
    "change",
    [{"model": "n"}, {"weights_epoch": 1}, {"rope": "x"}, {"kv_dtype": "uint8"}, {"head_dim": 9}],
)
def test_any_field_of_the_spec_gives_other_keys(change: dict[str, Any]) -> None:
    assert namespace_root(replace(SPEC, **change)) != ROOT
    assert namespace_root(SPEC, b"another tenant") != ROOT


def test_wire_form_of_keys() -> None:
    keys = block_keys(ROOT, list(range(128)), 64)
    assert split_keys(join_keys(keys)) == keys
    with pytest.raises(InvalidArgumentError, match="multiple of 32"):
        split_keys(b"x")
    with pytest.raises(InvalidArgumentError, match="32 bytes"):
        block_keys(b"short", [], 64)


def test_sizes_of_a_spec() -> None:
    assert SPEC.block_bytes == 4 * 2 * 2 * 64 * 8 * 2
    assert CacheSpec.raw("r", block_bytes=4097).slot_bytes == 8192


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "x" * 4097}, "longer than 4096"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"block_bytes": 1 << 31}, "block_bytes"),
        ({"format_version": 2}, "format_version is 2"),
    ],
)
def test_specs_that_can_not_be_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        replace(SPEC, **change)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="float8"):
        CacheSpec.gqa(
            model="m",
            weights_fingerprint="f",
            kv_dtype="float8",
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            rope="",
        )


def test_a_key_is_found_only_where_a_key_begins() -> None:
    keys = [hashlib.sha256(bytes([i])).digest() for i in range(9)]
    joined = b"".join(keys)
    assert all(holds_key(joined, key) for key in keys)
    assert not holds_key(joined[:-32], keys[-1])
    assert not holds_key(joined, joined[8:40])
    assert not holds_key(joined, keys[3][:8] + bytes(24)), "the same lead is not the same key"
    assert not holds_key(b"", bytes(32))
    assert holds_key(joined + bytes(32), bytes(32))
    assert holds_key(bytes([1] * 16) + bytes(48), bytes(32)), "behind one out of place"


def test_distinct_is_unique() -> None:
    rng = np.random.default_rng(1)
    for count in (0, 1, 2, 500):
        numbers = rng.integers(0, 200, count)
        assert distinct(numbers).tolist() == sorted(set(numbers.tolist()))
