"""Give every process of the tests one thread, because pytest-xdist runs one process on each core."""

import os

# Set before NumPy and torch are imported, which read them once.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
