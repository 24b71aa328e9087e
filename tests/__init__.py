"""One thread for each process that a test starts, itself included: pytest-xdist runs one on every core."""

import os

# Set before NumPy and torch are imported, which read them once.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
