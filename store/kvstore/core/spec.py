"""CacheSpec: everything that makes KV bytes usable by one engine and not by another."""

import struct
from dataclasses import dataclass, fields

from kvstore.errors import InvalidArgumentError

FORMAT_VERSION = 1
SLOT_ALIGN_BYTES = 4096
BLOCK_BYTES_MAX = 1 << 30
DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "uint8": 1,
}


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One engine's KV format; any field changed gives other keys.

    ``block_bytes`` counts all layers and heads of ``block_tokens`` tokens.
    """

    model: str
    weights_fingerprint: str
    weights_epoch: int
    kv_dtype: str
    format_version: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    attention: str
    rope: str
    block_tokens: int
    block_bytes: int

    def __post_init__(self) -> None:
        for name in ("model", "weights_fingerprint", "kv_dtype", "attention", "rope"):
            if len(getattr(self, name).encode()) > 4096:
                raise InvalidArgumentError(f"CacheSpec.{name} is longer than 4096 bytes")
        if not 1 <= self.block_tokens <= 1 << 16:
            raise InvalidArgumentError(f"block_tokens is {self.block_tokens}; take 1 to 65536")
        if not 1 <= self.block_bytes <= BLOCK_BYTES_MAX:
            raise InvalidArgumentError(
                f"block_bytes is {self.block_bytes}; take 1 to {BLOCK_BYTES_MAX}"
            )
        if self.format_version != FORMAT_VERSION:
            raise InvalidArgumentError(
                f"format_version is {self.format_version}; this build speaks {FORMAT_VERSION}"
            )

    @classmethod
    def gqa(
        cls,
        *,
        model: str,
        weights_fingerprint: str,
        kv_dtype: str,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        rope: str,
        block_tokens: int = 64,
        weights_epoch: int = 0,
    ) -> "CacheSpec":
        """The spec of a grouped-query model in the canonical layout
        ``[kv_head][layer][k, v][token][head_dim]``.
        """
        if kv_dtype not in DTYPE_BYTES:
            raise InvalidArgumentError(f"kv_dtype {kv_dtype!r}; take one of {sorted(DTYPE_BYTES)}")
        elements = num_kv_heads * num_layers * 2 * block_tokens * head_dim
        return cls(
            model=model,
            weights_fingerprint=weights_fingerprint,
            weights_epoch=weights_epoch,
            kv_dtype=kv_dtype,
            format_version=FORMAT_VERSION,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            attention="gqa",
            rope=rope,
            block_tokens=block_tokens,
            block_bytes=elements * DTYPE_BYTES[kv_dtype],
        )

    @classmethod
    def raw(cls, name: str, *, block_bytes: int, block_tokens: int = 64) -> "CacheSpec":
        """A namespace of opaque blocks, for clients that are no engine."""
        return cls(
            model=name,
            weights_fingerprint="",
            weights_epoch=0,
            kv_dtype="uint8",
            format_version=FORMAT_VERSION,
            num_layers=0,
            num_kv_heads=0,
            head_dim=0,
            attention="raw",
            rope="",
            block_tokens=block_tokens,
            block_bytes=block_bytes,
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot for one block: ``block_bytes`` rounded up to 4,096."""
        return -(-self.block_bytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES

    def encode(self) -> bytes:
        """Canonical bytes: every field in order, strings length-prefixed, integers as u64."""
        out = bytearray(b"kvstore.CacheSpec.1")
        for field in fields(self):
            value = getattr(self, field.name)
            data = value.encode() if isinstance(value, str) else struct.pack("<Q", value)
            out += struct.pack("<I", len(data)) + data
        return bytes(out)
