"""torch, its device, the workers and the memory."""

import os
from collections.abc import Iterator

import torch

from daemon.compute.resources import cuda_device, memory_budget, workers
from daemon.config import Settings
from daemon.doctor.finding import Finding, bad, ok, warn
from daemon.errors import BadConfig
from daemon.reports.sizing import PROCESS_BYTES, Sizing
from projector.text import size

FEW_BYTES = 1 << 30
THREADS = "OMP_NUM_THREADS"


def check(settings: Settings, need: Sizing | None) -> Iterator[Finding]:
    """need: None where it is not known what arrivals take."""
    yield ok("torch", f"{torch.__version__}, built for {torch.version.cuda or torch.version.hip or 'the CPU'}")
    yield _device(settings.compute.device)
    yield _workers(settings)
    yield _memory(settings, need)


def _device(wanted: str) -> Finding:
    there = torch.cuda.is_available()
    if wanted.startswith("cuda"):
        try:
            where = cuda_device(wanted)
            free, total = torch.cuda.mem_get_info(where)
        except (BadConfig, RuntimeError, AssertionError) as error:
            hint = error.hint if isinstance(error, BadConfig) else "look at nvidia-smi, or set compute.device = auto"
            return bad("device", str(error).partition("\n")[0], hint)
        return ok("device", f"{torch.cuda.get_device_name(where)}, {size(free)} of {size(total)} free")
    if wanted == "auto" and there:
        return ok("device", f"auto: {torch.cuda.get_device_name()}, or the CPU where that is faster")
    if wanted == "auto" and torch.version.cuda:
        hint = "look at nvidia-smi and the driver; where the machine has none, compute.device = cpu says so"
        return warn("device", "auto: the CPU; this torch is built for CUDA, and sees no device", hint)
    return ok("device", f"{wanted}: the CPU")


def _workers(settings: Settings) -> Finding:
    cores = len(os.sched_getaffinity(0))
    count = workers(settings.compute.threads)
    text = f"{count} workers on {cores} cores"
    if count > cores:
        return warn("workers", text, f"compute.threads = {cores}: more only wait for each other")
    if THREADS in os.environ and not os.environ[THREADS].isdecimal():
        return warn("workers", f"{THREADS} is {os.environ[THREADS]!r}", f"unset {THREADS}, or give a number")
    return ok("workers", text)


def _memory(settings: Settings, need: Sizing | None) -> Finding:
    budget = memory_budget(settings.compute)
    most = need.memory_bytes if need else PROCESS_BYTES + budget
    text = f"at most {size(most)}, of it {size(budget)} for tensors"
    if most - PROCESS_BYTES > budget:
        enough = most - PROCESS_BYTES
        return bad("memory", f"{text}, which one matrix does not fit into", f"set compute.memory_budget to {enough}")
    if PROCESS_BYTES + budget < FEW_BYTES:
        return warn("memory", text, "a limit of 1 GiB or more (MemoryMax=, --memory) is safe for small models")
    return ok("memory", text)
