"""Merges two experts by OPCM under a memory budget; prints by how many bytes the second raised the peak memory.

    python -m tests.memory.fold_within FOLDER BUDGET_BYTES [origin]

FOLDER holds base.safetensors, 1.safetensors and 2.safetensors; with `origin` the second counts from the first. Four
workers, as many as the daemon takes at most.
"""

import os
import sys
from pathlib import Path

import torch

from daemon.compute.resources import reuse_freed_memory
from projector.driver.fold import Driver
from projector.driver.head import HeadFold
from projector.driver.steps import state_specs
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.method import Contribution, Totals
from projector.methods import make
from tests.memory.fold_once import memory

METHOD = make("opcm")


def checkpoint(path: Path) -> Checkpoint:
    return Checkpoint([TensorReader(os.open(path, os.O_RDONLY))])


def fold(
    folder: Path,
    index: int,
    before: TensorReader | None,
    totals: Totals,
    driver: Driver,
    origin: Checkpoint | None = None,
) -> tuple[int, Totals]:
    """Folds one expert; the descriptor of the new state, and the totals."""
    base = checkpoint(folder / "base.safetensors")
    fd = os.open(folder / f"state.{index}", os.O_RDWR | os.O_CREAT)
    after = TensorWriter(fd, state_specs(METHOD, base.schema), {})
    head = HeadFold(METHOD, totals, Contribution(index), before, after, origin=origin)
    return fd, driver.fold(base, checkpoint(folder / f"{index}.safetensors"), [head]).totals[0]


if __name__ == "__main__":
    folder, budget = Path(sys.argv[1]), int(sys.argv[2])
    reuse_freed_memory()
    torch.set_num_threads(1)
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))  # loads what is loaded at first use
    fd, totals = fold(folder, 1, None, Totals(), Driver())
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    origin = checkpoint(folder / "1.safetensors") if "origin" in sys.argv[3:] else None
    fold(folder, 2, TensorReader(fd), totals, Driver(workers=4, budget_bytes=budget), origin)
    print(memory("VmHWM") - before)
