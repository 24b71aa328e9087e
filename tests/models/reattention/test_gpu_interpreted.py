"""The GPU kernels of re-attention on a CPU: what they compute, against the formula in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton", reason="CPU builds of torch bring no Triton")

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton's interpreter before 3.8 fails with NumPy 2.4",
)
@pytest.mark.parametrize("group", ["plain", "dropout", pytest.param("larger", marks=pytest.mark.slow)])
def test_kernels_compute_the_formula(group: str) -> None:
    """A process of its own, because Triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.reattention.gpu_interpreted", group],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
