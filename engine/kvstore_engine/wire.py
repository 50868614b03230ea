"""Frames between the server process and the engine process, and how the child is started.

One ZeroMQ message is one msgpack array of ``messages`` structs, in both directions, so that all
outputs of a step travel together.
"""

from collections.abc import Sequence

import msgspec

from kvstore_engine.config import EngineConfig
from kvstore_engine.messages import FromEngine, ToEngine


class Launch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one line of JSON that the engine process reads from stdin."""

    engine: EngineConfig
    requests: str  # ZeroMQ endpoint that the server bound for PUSH; the engine pulls
    outputs: str  # ZeroMQ endpoint that the server bound for PULL; the engine pushes
    server: int = 0  # its process id; 0: whoever is the parent


_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(list[ToEngine])
_from_engine = msgspec.msgpack.Decoder(list[FromEngine])


def encode(messages: Sequence[ToEngine] | Sequence[FromEngine]) -> bytes:
    """One frame."""
    return _encoder.encode(messages)


def decode_to_engine(frame: bytes) -> list[ToEngine]:
    """What the server said; msgspec.MsgspecError for anything else."""
    return _to_engine.decode(frame)


def decode_from_engine(frame: bytes) -> list[FromEngine]:
    """What the engine said; msgspec.MsgspecError for anything else."""
    return _from_engine.decode(frame)


def encode_launch(launch: Launch) -> bytes:
    """The line for the child's stdin, newline included."""
    return msgspec.json.encode(launch) + b"\n"


def decode_launch(line: bytes) -> Launch:
    """The child's side of ``encode_launch``."""
    return msgspec.json.decode(line, type=Launch)
