"""Where and how wide to compute: what the settings of [compute] mean on this machine."""

import os

import torch

from daemon.errors import BadConfig


def device(name: str) -> torch.device:
    """The device a setting means; "auto" is CUDA where there is one. Raises BadConfig where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = torch.device(name)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise BadConfig(
            f"compute.device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices",
            "set it to auto or cpu, or install a torch built for this machine's GPU",
        )
    return wanted


def workers(threads: int) -> int:
    """How many workers a setting means. Each holds a tensor or two in memory, hence not one for each of many cores."""
    return threads or min(4, os.cpu_count() or 1)
