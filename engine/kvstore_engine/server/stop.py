"""Finds stop strings in text that arrives in pieces, also across their borders."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on, except what could still turn out to be the start of a stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """``include``: the stop string that was met is part of the text."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is certain now; once ``matched`` is set, all of it is out."""
        if not self._stops or self.matched is not None:
            return text if self.matched is None else ""
        self._held += text
        if (found := self._first_match()) is not None:
            at, self.matched = found
            end = at + len(self.matched) if self._include else at
            out, self._held = self._held[:end], ""
            return out
        keep = self._possible_start()
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """What was held back; nothing more will come."""
        out, self._held = self._held, ""
        return out

    def _first_match(self) -> tuple[int, str] | None:
        """Where the stop string that is complete first stands, and which it is."""
        hits = [(at + len(s), at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        return min(hits)[1:] if hits else None

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stops):
                return length
        return 0
