"""Daemons as child processes in the foreground, none of which outlives this process."""

import asyncio
import contextlib
import ctypes
import signal
import sys
from collections.abc import Sequence

from kvstore.errors import KVStoreError

STOP_TIMEOUT_S = 15.0
EXIT_USAGE = 2
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ChildEndedError(KVStoreError):
    """A daemon ended that should run."""

    def __init__(self, name: str, code: int) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"{name} {how}")
        self.child_code = code


def _before_exec() -> None:
    # Also a killed parent leaves no daemon behind; Ctrl-C is for the parent, which ends them.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Child:
    """One daemon; its log goes to this process's stderr."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._drain: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, name: str, module: str, arguments: Sequence[str]) -> "Child":
        """Starts ``python -m module`` in this process's group."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            preexec_fn=_before_exec,
        )
        return cls(name, process)

    async def ready(self) -> str:
        """The address that the daemon serves on; ChildEndedError if it does not get that far."""
        assert self._process.stdout is not None
        mark = f"{self.name} ready: "
        async for raw in self._process.stdout:
            line = raw.decode(errors="replace")
            if line.startswith(mark):
                self._drain = asyncio.create_task(self._pass_on(self._process.stdout))
                return line.removeprefix(mark).removesuffix("\n")
        raise await self.ended()

    @staticmethod
    async def _pass_on(lines: asyncio.StreamReader) -> None:
        async for raw in lines:
            sys.stdout.write(raw.decode(errors="replace"))
            sys.stdout.flush()

    async def ended(self) -> ChildEndedError:
        """Waits for the daemon's end; says how it was."""
        return ChildEndedError(self.name, await self._process.wait())

    async def stop(self) -> None:
        """SIGTERM; SIGKILL where that does not help. Returns when the daemon has ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._drain is not None:
            await self._drain
