"""SSD admission policies behind one interface."""

from kvstore.core.admission.always import AlwaysPolicy
from kvstore.core.admission.base import AdmissionPolicy, SsdSpace
from kvstore.core.admission.reuse import ReusePolicy
from kvstore.core.admission.second_use import SecondUsePolicy
from kvstore.core.table import Table
from kvstore.errors import ConfigError

ADMISSIONS: dict[str, type[AdmissionPolicy]] = {
    "always": AlwaysPolicy,
    "second-use": SecondUsePolicy,
    "reuse": ReusePolicy,
}

__all__ = [
    "ADMISSIONS",
    "AdmissionPolicy",
    "AlwaysPolicy",
    "ReusePolicy",
    "SecondUsePolicy",
    "SsdSpace",
    "make_admission",
]


def check_admission(name: str) -> str:
    """The name; ConfigError if no policy has it."""
    if name not in ADMISSIONS:
        raise ConfigError(f"ssd_admission {name!r}; take one of {', '.join(ADMISSIONS)}")
    return name


def make_admission(name: str, table: Table, ssd: SsdSpace) -> AdmissionPolicy:
    """The policy of that name."""
    return ADMISSIONS[check_admission(name)](table, ssd)
