"""Between the client's values and the messages of node.proto."""

from collections.abc import Sequence
from dataclasses import asdict

import grpc
from kvstore.core.keys import KEY_BYTES
from kvstore.core.spec import CacheSpec
from kvstore.errors import InvalidArgumentError, KVStoreError, UnavailableError, error_from_code
from kvstore_proto import common_pb2

PROTOCOL_VERSION = 2
KEYS_MAX = 1 << 16  # in one request
MESSAGE_BYTES_MAX = 64 << 20
_MARGIN_S_MAX = 0.1
_BROKEN_CALL = "Internal error from Core"  # what grpc.aio says of a call whose connection broke

Keys = Sequence[bytes] | bytes


def joined_keys(keys: Keys) -> bytes:
    """The wire field of ``keys``, which may be joined already; checks length and number."""
    if isinstance(keys, bytes):
        joined = keys
    else:
        joined = b"".join(keys)
        if len(joined) != KEY_BYTES * len(keys):
            raise InvalidArgumentError(f"every key has {KEY_BYTES} bytes; these have others")
    if len(joined) % KEY_BYTES:
        raise InvalidArgumentError(
            f"a key list has {len(joined)} bytes; it must be a multiple of {KEY_BYTES}"
        )
    if len(joined) > KEYS_MAX * KEY_BYTES:
        raise InvalidArgumentError(
            f"{len(joined) // KEY_BYTES} keys in one request; split them, the limit is {KEYS_MAX}"
        )
    return joined


def spec_message(spec: CacheSpec) -> common_pb2.CacheSpec:
    """The message for ``spec``; its fields have the same names."""
    return common_pb2.CacheSpec(**asdict(spec))


def wait_ms(timeout_s: float) -> int:
    """How long the node may wait so that its answer is here before ``timeout_s`` is over."""
    if timeout_s <= 0:
        return 0
    return max(1, int(1000 * (timeout_s - min(_MARGIN_S_MAX, timeout_s / 10))))


def error_of_call(error: grpc.aio.AioRpcError) -> KVStoreError:
    """The typed error for the status that ended a call."""
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _BROKEN_CALL:
        return UnavailableError("the connection broke")
    code: int = error.code().value[0]
    return error_from_code(code, error.details() or error.code().name)
