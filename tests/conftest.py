"""Settings of every test run."""

import os

# Two workers that each start a thread per core are slower than one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
