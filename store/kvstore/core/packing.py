"""Where the keys of a window of an open-addressing table go, to be as near as they can come."""

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]


def packed(first: Places) -> tuple[Places, Places]:
    """Order of the keys with these first places, and the place of each in that order.

    Places count from the window's first, which is that of all keys that want an earlier one. No
    key comes further from its first place than the furthest has been, nor behind the last place
    that was taken; every place between is taken.
    """
    order = np.argsort(first, kind="stable")
    rank = np.arange(len(first))
    target = rank + np.maximum.accumulate(np.maximum(first[order], 0) - rank)
    return order, target
