"""What an SSD admission policy is."""

from abc import ABC, abstractmethod
from typing import Protocol

from kvstore.core.table import Mask, Rows, Table


class SsdSpace(Protocol):
    """What a policy may know of the tier that it guards."""

    def giving_way(self, rows: Rows) -> tuple[int, Rows]:
        """How many of these blocks free space takes, and the copies that would be evicted for
        those behind them, the first victim first.
        """
        ...


class AdmissionPolicy(ABC):
    """Decides which blocks are worth a write to SSD. Rows of a call are in chain order.

    A block that is passed over stays in DRAM until it gives way there, and is asked about again
    whenever it is used. The caller sees to it that no block gets to SSD before those that it
    continues, and that writes which ask for durability are never passed over.
    """

    def __init__(self, table: Table, ssd: SsdSpace) -> None:
        self.table = table
        self.ssd = ssd

    @abstractmethod
    def stored(self, rows: Rows, returning: Mask) -> Mask:
        """Blocks became readable in DRAM; which of them go to SSD.

        ``returning``: those that left this node not long ago.
        """

    @abstractmethod
    def used(self, rows: Rows, passed_over: Mask) -> Mask:
        """Blocks were used; which of those ``passed_over`` so far go to SSD now."""
