"""Block identity: namespace roots and the SHA-256 chain of block keys."""

import hashlib
import hmac
import struct
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvstore.core.spec import CacheSpec
from kvstore.errors import InvalidArgumentError

KEY_BYTES = 32
DEFAULT_TENANT = "default"
DEFAULT_TENANT_SECRET = b"kvstore tenant default, security off"
DEFAULT_TENANTS = {DEFAULT_TENANT: DEFAULT_TENANT_SECRET}

TokenIds = Sequence[int] | npt.NDArray[np.integer]


def namespace_root(spec: CacheSpec, secret: bytes = DEFAULT_TENANT_SECRET) -> bytes:
    """Start of every key chain of ``spec`` for the tenant with ``secret``; 32 bytes."""
    return hmac.new(secret, spec.encode(), hashlib.sha256).digest()


def salt_extra(cache_salt: str | None) -> dict[int, Sequence[bytes]]:
    """Extra keys that keep prompts of one salt apart from all others: on block 0."""
    return {0: (b"salt:" + cache_salt.encode(),)} if cache_salt else {}


def block_keys(
    root: bytes,
    tokens: TokenIds,
    block_tokens: int,
    extra: Mapping[int, Sequence[bytes]] | None = None,
    *,
    parent: bytes | None = None,
    first_block: int = 0,
) -> list[bytes]:
    """Keys of the full blocks of ``tokens``; a partial last block has none.

    Key i = SHA-256(key i-1, or the root ‖ tokens as little-endian u32 ‖ length-prefixed extras).
    ``extra`` maps a block's index in the prompt to its extra keys. To go on with a chain, pass the
    last key as ``parent``, the tokens after it, and the index of their first block.
    """
    if len(root) != KEY_BYTES:
        raise InvalidArgumentError(f"a namespace root has {KEY_BYTES} bytes, not {len(root)}")
    data = np.ascontiguousarray(tokens, dtype="<u4").data.cast("B")
    step = 4 * block_tokens
    previous = root if parent is None else parent
    keys = []
    for i in range(len(data) // step):
        digest = hashlib.sha256(previous)
        digest.update(data[i * step : (i + 1) * step])
        for item in (extra or {}).get(first_block + i, ()):
            digest.update(struct.pack("<I", len(item)))
            digest.update(item)
        previous = digest.digest()
        keys.append(previous)
    return keys


def check_joined(joined: bytes) -> None:
    """InvalidArgumentError unless this can be a wire field of n x 32 bytes."""
    if len(joined) % KEY_BYTES:
        raise InvalidArgumentError(
            f"a key list has {len(joined)} bytes; it must be a multiple of {KEY_BYTES}"
        )


def holds_key(joined: bytes, key: bytes) -> bool:
    """Whether ``key`` is one of a wire field of n x 32 bytes."""
    at = joined.find(key)
    return at >= 0 and (at % KEY_BYTES == 0 or key in split_keys(joined))


def split_keys(joined: bytes) -> list[bytes]:
    """The keys of one wire field of n x 32 bytes."""
    check_joined(joined)
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def join_keys(keys: Iterable[bytes]) -> bytes:
    """One wire field from keys."""
    return b"".join(keys)
