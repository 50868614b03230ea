"""Every block is written to SSD."""

import numpy as np

from kvstore.core.admission.base import AdmissionPolicy
from kvstore.core.table import Mask, Rows


class AlwaysPolicy(AdmissionPolicy):
    """Nothing is lost by leaving DRAM; the SSD takes every write."""

    def stored(self, rows: Rows, returning: Mask) -> Mask:
        """All."""
        del returning
        return np.ones(len(rows), dtype=np.bool_)

    def used(self, rows: Rows, passed_over: Mask) -> Mask:
        """All, though none is passed over."""
        del rows
        return passed_over
