"""How much a fault suite does: quick in `make test`, full in `make test-full`, soak on request.

``KVSTORE_COLUMN`` names the column, ``KVSTORE_SEED`` replays the run that printed this seed.
"""

import os
from typing import TypeVar

COLUMNS = ("quick", "full", "soak")
COLUMN = os.environ.get("KVSTORE_COLUMN", "quick")
assert COLUMN in COLUMNS, f"KVSTORE_COLUMN={COLUMN!r}; take one of {', '.join(COLUMNS)}"

SEED = int(os.environ.get("KVSTORE_SEED", "0x2a"), 0)

ValueT = TypeVar("ValueT")


def size(quick: ValueT, full: ValueT, soak: ValueT) -> ValueT:
    """The one of the column that runs."""
    return {"quick": quick, "full": full, "soak": soak}[COLUMN]
