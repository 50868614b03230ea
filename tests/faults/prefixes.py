"""For the planted bug ``compare-64-bits``: a dict that looks at 8 bytes of a key only."""

from typing import Any

BYTES = 8


class PrefixDict(dict[bytes, int]):
    """Keys with the same first 8 bytes are one key."""

    def __getitem__(self, key: bytes) -> int:
        return super().__getitem__(key[:BYTES])

    def __setitem__(self, key: bytes, row: int) -> None:
        super().__setitem__(key[:BYTES], row)

    def __delitem__(self, key: bytes) -> None:
        super().pop(key[:BYTES], None)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and super().__contains__(key[:BYTES])

    def get(self, key: bytes, default: Any = None) -> Any:
        """As of a dict."""
        return super().get(key[:BYTES], default)

    def update(self, pairs: Any) -> None:  # type: ignore[override]
        """Of pairs only."""
        super().update((key[:BYTES], row) for key, row in pairs)
