"""What all tests need before anything of the project is imported."""

import os
from pathlib import Path

import torch

# numba keeps what it compiled in files without a lock: every process of a parallel run has its own.
_worker = os.environ.get("PYTEST_XDIST_WORKER")
if _worker is not None:
    os.environ["NUMBA_CACHE_DIR"] = str(Path(__file__).parents[1] / "build" / "numba" / _worker)

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter; read where they are defined.
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import interpreter

    interpreter.patch_once()
