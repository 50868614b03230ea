"""Shared pieces of the model tests: pages, reference models, and one thread under xdist."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.models.model_harness import one_thread_each


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        one_thread_each()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260101)
