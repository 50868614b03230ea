"""The cluster epoch as a node knows it: what is ordered under an older one is refused."""

from kvstore.errors import StaleEpochError


class EpochGuard:
    """The newest cluster epoch seen; it never goes back.

    A master that was replaced, or came back with old state, still has its old epoch: nothing that
    it orders may change anything.
    """

    def __init__(self) -> None:
        self.newest = 0
        self.refused = 0

    def admit(self, epoch: int) -> None:
        """Takes the epoch of an order, which is to be carried out only if this returns.

        StaleEpochError if a newer one was seen.
        """
        if epoch < self.newest:
            self.refused += 1
            raise StaleEpochError(
                f"cluster epoch {epoch} is older than {self.newest}: another master has taken over"
            )
        self.newest = epoch
