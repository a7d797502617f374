"""Cuts the task vector of one model to rank 8; prints by how many bytes that raised the process's memory at most.

    python tests/memory/adapt_once.py FOLDER TENSORS

The model has TENSORS matrices of 1024 x 256 float32, each of which moved.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from daemon.checkpoints.checkpoint import open_path
from daemon.config import Settings
from daemon.layout import Home
from daemon.manifest import FileEntry
from daemon.versions.adapter import Adapting
from projector.watch import SILENT
from tests.memory.fold_once import memory

SHAPE = (1024, 256)
WEIGHTS = "model.safetensors"


def write(folder: Path, tensors: int) -> None:
    """The base and what is published, which differs from it."""
    draw = torch.Generator().manual_seed(0)
    names = [f"layers.{n}.weight" for n in range(tensors)]
    for path in (Home(folder).base, folder / "published"):
        path.mkdir(parents=True)
        save_file({name: torch.randn(SHAPE, generator=draw) for name in names}, path / WEIGHTS)


def adapt(folder: Path) -> None:
    settings = Settings.model_validate({"heads": {"main": {"adapter": {"rank": 8}}}, "compute": {"threads": 1}})
    with open_path(Home(folder).base) as base:
        adapting = Adapting(Home(folder), base.tensors, settings, SILENT)
        found = adapting.write("main", folder / "published", [FileEntry(WEIGHTS, 0, "")], "base")
    assert found and 0 < found.kept < 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, tensors = Path(sys.argv[1]), int(sys.argv[2])
    write(folder / "few", 2)
    adapt(folder / "few")  # loads whatever is loaded at first use
    write(folder / "all", tensors)
    Path("/proc/self/clear_refs").write_text("5")  # what came before does not count
    before = memory("VmRSS")
    adapt(folder / "all")
    print(memory("VmHWM") - before)
