"""Folds one expert of zeros and publishes; prints by how many bytes that raised the process's resident memory at most.

    python tests/memory/fold_once.py FOLDER TENSORS ROWS METHOD

The model has TENSORS embeddings of ROWS x 256 float32. The files are sparse: only what the fold writes costs disk.
"""

import os
import sys
from pathlib import Path

import torch

from projector.driver.fold import Driver
from projector.driver.head import HeadFold
from projector.driver.steps import state_specs
from projector.files.header import build_header
from projector.files.source import Checkpoint
from projector.files.tensorfile import RunningDigest, TensorReader, TensorWriter
from projector.method import Contribution, Totals
from projector.methods import make
from projector.spec import TensorSpec

WIDTH = 256


def memory(line: str) -> int:
    """VmRSS (now) or VmHWM (the most since the start or the last reset), in bytes."""
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))
    return int(found.split()[1]) * 1024


def sparse(path: Path, specs: list[TensorSpec]) -> int:
    """A file of zeros with these tensors, open for reading."""
    opening, header = build_header(specs, {})
    path.write_bytes(opening)
    os.truncate(path, header.size)
    return os.open(path, os.O_RDONLY)


def fold(folder: Path, tensors: int, rows: int, name: str) -> None:
    specs = [TensorSpec(f"embed.{index}", (rows, WIDTH), torch.float32) for index in range(tensors)]
    base = Checkpoint([TensorReader(sparse(folder / "base", specs))])
    fd = sparse(folder / "expert", specs)
    expert = TensorReader(fd, RunningDigest(fd))
    method = make(name)
    state_fd = os.open(folder / "state", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    out_fd = os.open(folder / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    state = TensorWriter(state_fd, state_specs(method, base.schema), {})
    driver = Driver()
    folded = driver.fold(base, Checkpoint([expert]), [HeadFold(method, Totals(), Contribution(1), None, state)])
    out = TensorWriter(out_fd, specs, {})
    driver.read_out(base, method, folded.totals[0], TensorReader(state_fd), [out])
    expert.sha256(), state.finish(), out.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, tensors, rows, method = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    fold(folder, 1, 16, method)  # loads whatever is loaded at first use
    Path("/proc/self/clear_refs").write_text("5")  # what importing took at its peak does not count
    before = memory("VmRSS")
    fold(folder, tensors, rows, method)
    print(memory("VmHWM") - before)
