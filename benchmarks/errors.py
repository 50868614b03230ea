"""What ends a benchmark."""


class BenchmarkError(Exception):
    """The benchmark cannot go on; the message says why."""
