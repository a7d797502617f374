"""I9 at the level of the driver: peak memory grows neither with the number of tensors nor with the size of a tensor
that goes through in blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from projector.fold import BLOCK_BYTES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
ROW_BYTES = 256 * 4
ROWS_8_MIB = 8 * MIB // ROW_BYTES

# With one worker up to three blocks are under way: one is read, one computed, one written. Each is a block of the base,
# of the expert and of the states, and a float64 copy for a norm counts twice. How they meet is a matter of timing.
BLOCKS_AT_ONCE = 14
TIMING = 3

# As daemon.memory has it: a freed block goes back to the system.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def grown(tmp_path: Path, tensors: int, rows: int, method: str) -> int:
    """By how much a fold and a read-out raise a fresh process's peak memory, in bytes."""
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fold_once.py"), str(tmp_path), str(tensors), str(rows), method],
        env={**os.environ, "PYTHONPATH": str(ROOT), **MALLOC},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = int(ran.stdout)
    size = tensors * rows * ROW_BYTES
    print(f"{method}, {tensors} x {rows} rows, {size / MIB:.0f} MiB: peak grew by {found / MIB:.1f} MiB")
    assert found > 4 * MIB, "nothing was measured"
    return found


def test_memory_is_flat_in_the_number_of_tensors(tmp_path: Path) -> None:
    few = grown(tmp_path, 4, ROWS_8_MIB, "mean")
    many = grown(tmp_path, 24, ROWS_8_MIB, "mean")
    assert many - few <= TIMING * 8 * MIB, "20 more tensors"
    assert many <= BLOCKS_AT_ONCE * 8 * MIB


def test_memory_is_flat_in_the_size_of_an_embedding_beyond_a_block(tmp_path: Path) -> None:
    four = grown(tmp_path, 1, 4 * BLOCK_BYTES // ROW_BYTES, "opcm")
    sixteen = grown(tmp_path, 1, 16 * BLOCK_BYTES // ROW_BYTES, "opcm")
    assert sixteen - four <= TIMING * BLOCK_BYTES, "12 more blocks"
    assert sixteen <= BLOCKS_AT_ONCE * BLOCK_BYTES
