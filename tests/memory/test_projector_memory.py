"""I9 at the level of the driver: peak memory grows neither with the number of tensors nor with the size of a tensor
that goes through in blocks."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from projector.fold import BLOCK_BYTES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
ROW_BYTES = 256 * 4
ROWS_8_MIB = 8 * MIB // ROW_BYTES

# At once: a block of the base, of the expert as read and as a difference, of the old state and the new one, a float64
# copy for a norm, which counts twice, and what the next block's reading overlaps with.
BLOCKS_AT_ONCE = 8
NOISE = 4 * MIB

# glibc raises its threshold for mmap to the size of the largest block that was freed, keeps blocks on a heap from then
# on, and that heap has holes: up to two and a half times what is in use, though it stops there.
PINNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
HOLES = 2.5


def grown(tmp_path: Path, tensors: int, rows: int, method: str, malloc: Mapping[str, str] = PINNED) -> int:
    """By how much a fold and a read-out raise a fresh process's peak memory, in bytes."""
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fold_once.py"), str(tmp_path), str(tensors), str(rows), method],
        env={**os.environ, "PYTHONPATH": str(ROOT), **malloc},
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
    few = grown(tmp_path, 2, ROWS_8_MIB, "mean")
    many = grown(tmp_path, 24, ROWS_8_MIB, "mean")
    assert abs(many - few) <= NOISE
    assert many <= BLOCKS_AT_ONCE * 8 * MIB


def test_memory_is_flat_in_the_size_of_an_embedding_beyond_a_block(tmp_path: Path) -> None:
    two = grown(tmp_path, 1, 2 * BLOCK_BYTES // ROW_BYTES, "opcm")
    twelve = grown(tmp_path, 1, 12 * BLOCK_BYTES // ROW_BYTES, "opcm")
    assert abs(twelve - two) <= NOISE
    assert twelve <= BLOCKS_AT_ONCE * BLOCK_BYTES


def test_memory_is_bounded_with_an_allocator_that_keeps_holes(tmp_path: Path) -> None:
    found = grown(tmp_path, 1, 20 * BLOCK_BYTES // ROW_BYTES, "opcm", malloc={})
    assert found <= HOLES * BLOCKS_AT_ONCE * BLOCK_BYTES
