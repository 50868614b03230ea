"""Named places where a test may kill the process or fail a step; inert unless enabled at start.

``KVSTORE_FAULTPOINTS="ssd.data:eio@3,ssd.index:kill"`` fails the third pass of ``ssd.data`` with
EIO, and kills the process with SIGKILL at the first pass of ``ssd.index``.
"""

import errno
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.errors import ConfigError

ENVIRONMENT = "KVSTORE_FAULTPOINTS"
ACTIONS = ("kill", "eio", "enospc")


@dataclass
class _Fault:
    action: str
    passes_left: int


_faults: dict[str, list[_Fault]] = {}


def faultpoint(name: str) -> None:
    """Does nothing, or what was asked for at this place: SIGKILL, or an OSError."""
    if _faults and name in _faults:
        _pass(name)


def enable_faultpoints(environ: Mapping[str, str]) -> None:
    """Arms what ``KVSTORE_FAULTPOINTS`` names, and only that; ConfigError if it is malformed."""
    _faults.clear()
    for item in filter(None, environ.get(ENVIRONMENT, "").split(",")):
        name, colon, rest = item.strip().partition(":")
        action, _, number = rest.partition("@")
        if not colon or action not in ACTIONS or not (number or "1").isdecimal():
            raise ConfigError(f"{ENVIRONMENT}: {item!r}; write it like ssd.data:eio@3")
        _faults.setdefault(name, []).append(_Fault(action, int(number or "1")))


def _pass(name: str) -> None:
    due = ""
    for fault in _faults[name]:
        fault.passes_left -= 1
        if fault.passes_left == 0:
            due = fault.action
    if due == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif due:
        code = errno.EIO if due == "eio" else errno.ENOSPC
        raise OSError(code, f"{os.strerror(code)} (faultpoint {name})")
