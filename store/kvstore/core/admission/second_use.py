"""A block is written to SSD once it was used again.

Cache-on-second-hit: Maggs and Sitaraman, "Algorithmic nuggets in content delivery", CCR 2015, and
the reject-first admission of CacheLib (Berg et al., OSDI 2020). Where these keep a Bloom filter of
keys seen once, here DRAM holds the block itself, and the node's ghosts remember it afterwards.
"""

from kvstore.core.admission.base import AdmissionPolicy
from kvstore.core.table import Mask, Rows


class SecondUsePolicy(AdmissionPolicy):
    """What nobody ever asks for again costs no write."""

    def stored(self, rows: Rows, returning: Mask) -> Mask:
        """Those that were here before: somebody wanted them a second time."""
        del rows
        return returning

    def used(self, rows: Rows, passed_over: Mask) -> Mask:
        """All that were passed over."""
        del rows
        return passed_over
