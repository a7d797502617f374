"""I9 at the level of the driver: peak memory grows neither with the number of tensors nor with the size of a tensor
that goes through in blocks."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import save_file

from projector.driver.steps import BLOCK_BYTES, Step, fold_bytes
from projector.methods import make, methods
from projector.spec import TensorSpec
from tests.memory import fold_many

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
ROW_BYTES = 256 * 4
ROWS_8_MIB = 8 * MIB // ROW_BYTES

# With one worker up to three blocks are under way: one is read, one computed, one written. Each is a block of the base,
# of the expert and of the states, and a float64 copy for a norm counts twice. How they meet is a matter of timing.
BLOCKS_AT_ONCE = 14
TIMING = 3

HEAP_SLACK = 8 * MIB  # the result being written, and the eigensolver's own buffers, one for each worker

EXPERT_BYTES = 4 * sum(prod(shape) for shape in fold_many.SHAPES.values())

# A freed block goes back to the system at once, so that what is measured is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
FIRST = ("opcm", "ties")  # the others are measured with the slow tests


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


@pytest.mark.parametrize(
    "names", [FIRST, pytest.param([name for name in methods() if name not in FIRST], marks=pytest.mark.slow)], ids=len
)
def test_no_method_takes_more_memory_for_a_later_expert(names: Sequence[str]) -> None:
    """Sixteen experts: the median over the last five against that over the second to the sixth, ten before.

    How blocks meet moves a peak by some megabytes; a method that held on to a fifth of each expert would be found.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "tests.memory.fold_many", "16", *names],
        env={**os.environ, "PYTHONPATH": str(ROOT), **MALLOC},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, list[int]] = json.loads(ran.stdout)
    assert found.keys() == set(names)
    grew = {name: median(peaks[-5:]) - median(peaks[1:6]) for name, peaks in found.items()}
    print({name: f"{bytes_ / MIB:.1f} MiB" for name, bytes_ in grew.items()})
    assert {name: bytes_ for name, bytes_ in grew.items() if bytes_ > 2 * EXPERT_BYTES} == {}


@pytest.mark.parametrize(("at_once", "origin"), [(1, False), (3, False), (3, True)])
def test_the_budget_holds_whatever_the_workers(tmp_path: Path, at_once: int, origin: bool) -> None:
    """Four workers and twelve matrices, and a budget for one matrix, or three, at a time; also where the expert counts
    from another model than the base."""
    side = 512
    for number, name in enumerate(("base", "1", "2")):
        draw = torch.Generator().manual_seed(number)
        weights = {f"layers.{i}.weight": torch.randn(side, side, generator=draw) for i in range(12)}
        save_file(weights, tmp_path / f"{name}.safetensors")
    step = Step(TensorSpec("layers.0.weight", (side, side), torch.float32))
    budget = at_once * fold_bytes([make("opcm")], step, origin=origin)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.memory.fold_within", str(tmp_path), str(budget), *(["origin"] if origin else [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    print(f"budget {budget / MIB:.1f} MiB: peak grew by {int(ran.stdout) / MIB:.1f} MiB")
    assert int(ran.stdout) <= budget + HEAP_SLACK
