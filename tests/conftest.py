"""What all tests need before anything of the project is imported."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.interpreter import patch_once, programs

# numba keeps what it compiled in files without a lock: every process of a parallel run has its own.
_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker is not None:
    os.environ["NUMBA_CACHE_DIR"] = str(Path(__file__).parents[1] / "build" / "numba" / _worker)

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter; read where they are defined.
    os.environ["TRITON_INTERPRET"] = "1"
    patch_once()


@pytest.fixture(scope="module")
def few_programs():
    """Without a GPU: two for a line, which then read what they have met."""
    with nullcontext() if torch.cuda.is_available() else programs(2, 1):
        yield
