"""One thread for torch, random numbers that repeat, and the way to the shared harness."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Workers run side by side: threads that wait for each other would make all of them slow."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260101)
