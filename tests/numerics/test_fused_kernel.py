"""The tests of the fused loss once more, by way of the GPU kernel in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NUMERICS = Path(__file__).parent


def run_fused_tests(chosen: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs tests of test_fused.py in a process of their own, on the kernel's way."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(NUMERICS / "test_fused.py"), "-k", chosen],
        env={**os.environ, "KERNEL_ON_CPU": "1", "OMP_NUM_THREADS": "1", **environment},
        cwd=NUMERICS.parents[1],
        capture_output=True,
        text=True,
    )


def test_the_fused_loss_is_right_with_the_kernel_too() -> None:
    """Padded buffers, a gradient in the head's dtype, products of views of both."""
    chosen = "value_and and not float64 and not 64 or transforms_and and cap"
    more = "or zero_rows or masked or infinite or nan or terms_share"
    done = run_fused_tests(f"{chosen} {more}", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 60


def test_that_run_does_use_the_kernel() -> None:
    """Without the interpreter the kernel cannot run on a CPU, so the same run must fail."""
    assert run_fused_tests("terms_share").returncode == 1
