"""Where, how wide and in how much memory to compute: what the settings of [compute] mean on this machine."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from daemon.config import Compute
from daemon.errors import BadConfig
from projector.fold import Driver
from projector.method import Method
from projector.spec import Schema
from projector.steps import largest_step
from projector.text import shown
from projector.watch import SILENT, Watch

MY_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_LIMITS = ("memory.max", "memory.limit_in_bytes")  # of version 2, and of version 1


def driver(settings: Compute, watch: Watch = SILENT) -> Driver:
    """The driver that the settings ask for. Raises BadConfig where the device is not there."""
    return Driver(
        device(settings.device), settings.block_bytes, workers(settings.threads), memory_budget(settings), watch
    )


def device(name: str) -> torch.device:
    """The device a setting means; "auto" is CUDA where there is one. Raises BadConfig where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = torch.device(name)
    if wanted.type == "cuda":  # several streams give the same bits each time only with this; read at cuBLAS's first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise BadConfig(
            f"compute.device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices",
            "set it to auto or cpu, or install a torch built for this machine's GPU",
        )
    return wanted


def workers(threads: int) -> int:
    """How many workers a setting means. Each holds a tensor or two in memory, hence not one for each of many cores."""
    return threads or min(4, os.cpu_count() or 1)


def memory_budget(settings: Compute) -> int:
    """The bytes that all tensors in hand may take; by default half of the memory that this process may use."""
    return settings.memory_budget or _usable_memory() // 2


def check_budget(schema: Schema, methods: Sequence[Method], settings: Compute) -> None:
    """Raises BadConfig where one tensor alone does not fit into the memory budget, with both numbers."""
    budget = memory_budget(settings)
    step, need = largest_step(schema, methods, settings.block_bytes)
    if need > budget:
        raise BadConfig(
            f"{shown(step.spec.name)} {list(step.spec.shape)} needs {need} bytes of memory to be merged, "
            f"the memory budget is {budget}",
            f"set compute.memory_budget to {need} or more (MAINSTEM_COMPUTE__MEMORY_BUDGET={need}), "
            "or use a machine with more memory",
        )


def _usable_memory() -> int:
    """Bytes of physical memory, or of the control group's limit where that is lower."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _cgroup_folders():
        for name in CGROUP_LIMITS:
            with suppress(OSError):
                text = (path / name).read_text().strip()
                if text.isdecimal():  # "max" where there is none
                    limits.append(int(text))
    return min(limits)


def _cgroup_folders() -> list[Path]:
    """This process's control groups and all above them, each of which may set a limit."""
    folders = [CGROUPS, CGROUPS / "memory"]
    with suppress(OSError):
        for line in MY_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS / "memory" if "memory" in controllers.split(",") else CGROUPS
            below = root / path.strip("/")
            folders += [below, *(above for above in below.parents if above.is_relative_to(root))]
    return folders
