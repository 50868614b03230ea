"""The line that a suite prints at its end, also when the tests run on several processes."""

from collections.abc import Callable, Iterable

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


def merged(lines: Iterable[str]) -> list[str]:
    """The lines in their order, with the parts of one suite (same name and counts) added up."""
    sums: dict[tuple[str, ...], list[int]] = {}
    whole: list[str] = []
    for line in lines:
        suite, _, rest = line.partition(": ")
        fields = [field.partition("=") for field in rest.split()]
        seed = rest.rpartition(" ")[2]
        if any(not value.isdecimal() for _, _, value in fields[:-1]):
            whole.append(line)
            continue
        name = (suite, seed, *(field for field, _, _ in fields[:-1]))
        values = [int(value) for _, _, value in fields[:-1]]
        before = sums.get(name, [0] * len(values))
        sums[name] = [a + b for a, b in zip(before, values, strict=True)]
    for (suite, seed, *names), values in sums.items():
        shown = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
        whole.append(f"{suite}: {' '.join(shown)} {seed}")
    return sorted(whole)
