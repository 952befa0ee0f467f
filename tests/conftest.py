"""Settings of every test run."""

import os

import pytest

# Two workers that each start a thread per core are slower than one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeded():
    """Give every test the same random numbers in every run: a network drawn at random may lack what a test looks at."""
    import torch  # not above: the line before it must come first

    torch.manual_seed(2)
