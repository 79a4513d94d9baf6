"""The same start for every test: seeded generators, one thread, no deadline and no files from hypothesis."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from hypothesis import settings

# The same examples in every run, so that a failure is of the change and not of the day; new ones are drawn by
# "pytest --hypothesis-profile explore".
settings.register_profile("nas", deadline=None, database=None, derandomize=True)
settings.register_profile("explore", deadline=None, database=None)
settings.load_profile("nas")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
