"""The line that a suite prints at its end, also when the tests run on several processes."""

from collections.abc import Callable

from tests.faults.columns import SEED

PROPERTY = "suite-line"
Record = Callable[[str, object], None]


def finish(record_property: Record, suite: str, seed: int = SEED, **counts: int | float) -> None:
    """Reports ``F6 power-loss: cycles=100 … seed=0x2a``, and fails if a count of harm is not 0.

    ``suite`` is the id and the name; ``counts`` must have ``lost`` and ``wrong``.
    """
    shown = [f"{name}={value}" for name, value in counts.items()]
    line = f"{suite}: {' '.join(shown)} seed={seed:#x}"
    record_property(PROPERTY, line)
    print(line)
    assert counts["lost"] == 0, line
    assert counts["wrong"] == 0, line
