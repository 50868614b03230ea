"""How a command starts: Ctrl-C ends it at once and without a traceback while its modules load."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"


def _end(_signal: int, _frame: FrameType | None) -> None:
    # Not by an exception: the import of a C extension may turn one into an error of its own.
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """SIGINT ends the process with EXIT_INTERRUPTED until something else handles it.

    Nothing is cleaned up, so hold nothing within that has to be. An ignored SIGINT stays ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def wake_few_threads() -> None:
    """Has gRPC of this process do without its event engine, which wakes several threads a message.

    Call before grpc is imported; what the user set stays. Figures:
    docs/decisions/0005-grpc-without-its-event-engine.md.
    """
    os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)


def start_small() -> None:
    """Has numpy of this process take no huge pages, and its OpenBLAS no threads that spin.

    Call before numpy is imported; a variable that the user set stays. Figures:
    docs/decisions/0010-daemons-start-small.md.
    """
    os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
