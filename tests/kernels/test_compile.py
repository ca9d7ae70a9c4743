"""The GPU kernels compile, where there is no GPU to run them."""

import os
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "_prepare",
    "_probe",
    "_settle",
    "_scan",
    "_look",
    "_unite",
    "_selected",
    "_gather",
    "_little",
    "_lists",
    "_locate",
    "_tiles",
    "join_parts",
    "_dense",
    "_add_norm",
    "_silu_mul",
    "_linear",
    "_gated_linear",
    "_rotate_and_write",
    "_code_pages",
}


def test_every_kernel_compiles_for_hopper():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_gpu.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == KERNELS
