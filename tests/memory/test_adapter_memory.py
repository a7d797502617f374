"""What making an adapter takes depends on the largest matrix, not on how many there are."""

import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from tests.memory.adapt_once import SHAPE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

ROOT = Path(__file__).parents[2]
MATRIX = 4 * prod(SHAPE)
SLACK = 4 << 20
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}  # a freed matrix goes back to the system at once


def grown(folder: Path, tensors: int) -> int:
    """By how much it raises a fresh process's peak memory, in bytes."""
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "adapt_once.py"), str(folder), str(tensors)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **MALLOC},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    print(f"{tensors} matrices, {tensors * MATRIX >> 20} MiB: peak grew by {int(ran.stdout) / (1 << 20):.1f} MiB")
    return int(ran.stdout)


def test_an_adapter_takes_no_more_memory_for_more_matrices(tmp_path: Path) -> None:
    few, many = grown(tmp_path / "1", 6), grown(tmp_path / "2", 48)
    assert few > MATRIX, "nothing was measured"
    assert many < few + SLACK < 48 * MATRIX
