"""Planted bugs: the suites count only if they catch them (``python -m tests.teeth``).

``python -m tests.faults.planted MODULE [FLAGS]`` runs a daemon with the bug that
``KVSTORE_PLANTED_BUG`` names; pytest plants it in every process that runs tests.
"""

import os
import runpy
import sys
from collections.abc import Callable, Mapping
from functools import partial

from tests.faults.daemons import PLANTED
from tests.faults.mutation import Mutation, mutate

MUTATIONS: Mapping[str, tuple[Mutation, ...]] = {
    "skip-fsync": (
        Mutation("kvstore.node.ssd_file:SsdFile.sync", "os.fdatasync(self._descriptor)", "pass"),
        Mutation("kvstore.node.ssd_index:SsdIndex._open", "**options\n", "sync=False, **options\n"),
    ),
    "ack-before-write": (
        Mutation(
            "kvstore.core.transfers:Transfers._start_writes",
            "self._writes[row] = write\n",
            "self._writes[row] = write\n"
            "        self.tiering.on_settled(np.array([row]), AckLevel.SYNCED)\n",
        ),
    ),
    "skip-directory-fsync": (
        Mutation("kvstore.durable:write_durably", "sync_directory(path.parent)", "pass"),
    ),
    "skip-checksum": (
        Mutation("kvstore.node.ssd_block:verify", "return all(", "return True or all("),
    ),
    "compare-64-bits": (
        Mutation(
            "kvstore.core.key_index:KeyIndex.find",
            ".tobytes() == key:",
            ".tobytes()[:8] == key[:8]:",
        ),
        Mutation(
            "kvstore.core.key_index:_same",
            "(keys == others).view(np.uint32).ravel() == _ALL_SAME",
            "keys[:, 0] == others[:, 0]",
        ),
        Mutation("kvstore.core.directory:_same_key", "range(1, 4)", "range(1, 1)"),
    ),
    "visible-before-commit": (
        Mutation(
            "kvstore.core.acquire:Acquires._leading",
            "(state == DramState.LIVE)",
            "np.isin(state, (DramState.LIVE, DramState.FILLING))",
        ),
        Mutation(
            "kvstore.core.acquire:Acquires._advance",
            "table.dram_state[ahead] == DramState.LIVE",
            "np.isin(table.dram_state[ahead], (DramState.LIVE, DramState.FILLING))",
        ),
    ),
    "ignore-lease": (
        Mutation(
            "kvstore.core.tiering:Tiering._may_leave_dram", " & (table.pins[rows] == 0)\n", "\n"
        ),
    ),
    "no-generation-check": (
        Mutation(
            "kvstore_client.lease:Lease.still_valid",
            "return bool(",
            "return True or bool(",
        ),
    ),
    "ignore-epoch": (
        Mutation("kvstore.core.epoch:EpochGuard.admit", "if epoch < self.newest:", "if False:"),
    ),
    "leak-pending": (
        Mutation(
            "kvstore.core.reserve:Reserves.let_all_go",
            "self._give_back(reservation, np.flatnonzero(reservation.open))",
            "pass",
        ),
    ),
    "swallow-eio": (
        Mutation(
            "kvstore.node.ssd_writer:SsdWriter._synced",
            'self._fail(f"fdatasync: {error}")\n'
            "        return {id(op): IoOutcome.FAILED for op in writes}",
            'log.error("fdatasync: %s", error)',
        ),
    ),
    "drop-tenant": (
        Mutation(
            "kvstore.core.node_core:NodeCore.open_namespace",
            "namespace_root(spec, self._tenants[tenant])",
            "namespace_root(spec)",
        ),
    ),
}


def _plant(mutations: tuple[Mutation, ...]) -> None:
    for mutation in mutations:
        mutate(mutation)


BUGS: Mapping[str, Callable[[], None]] = {
    name: partial(_plant, mutations) for name, mutations in MUTATIONS.items()
}


def plant(name: str) -> None:
    """Replaces the right code by the wrong one, in this process, for good.

    LookupError where there is no such bug, or the code that it changes has moved.
    """
    if name not in BUGS:
        raise LookupError(f"{PLANTED}={name!r}; take one of {', '.join(BUGS)}")
    BUGS[name]()


def main() -> None:
    """Entry point; with ``--check`` plants every bug, to see whether it can be."""
    if sys.argv[1:] == ["--check"]:
        for name in BUGS:
            plant(name)
        return
    plant(os.environ[PLANTED])
    module = sys.argv[1]
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
