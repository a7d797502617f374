"""Where a worker computes: the CPU, or a CUDA device with a stream for each worker.

On CUDA tensors travel through pinned memory, which torch keeps and reuses, and without waiting: while one worker's
tensor is on its way, another's is computed on. What does not fit into the device's memory is computed on the CPU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from projector.watch import Watch

CPU = torch.device("cpu")
_idle: dict[torch.device, list[torch.cuda.Stream]] = {}
"""Streams that no worker uses now: torch caches memory for each stream, so there must be few of them."""
Out = TypeVar("Out")


def compute_on(device: torch.device, work: Callable[[torch.device], Out], name: str, watch: Watch) -> Out:
    """work(device) in this thread's stream. Out of device memory, work(CPU): `watch` hears of it, with the name."""
    if device.type != "cuda":
        return work(device)
    try:
        with _stream(device):
            return work(device)
    except torch.OutOfMemoryError:
        pass  # outside of the handler, the traceback no longer holds on to what was allocated
    torch.cuda.empty_cache()
    watch.fell_back(name)
    return work(CPU)


def load(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, in this thread's stream."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def load_each(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors by key, loaded."""
    return {key: load(tensor, device) for key, tensor in tensors.items()}


def unload(x: Tensor) -> Tensor:
    """A tensor on the CPU, complete."""
    if x.device.type == "cpu":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host


@contextmanager
def _stream(device: torch.device) -> Iterator[None]:
    """A stream of this worker's own while the block lasts."""
    idle = _idle.setdefault(device, [])
    try:
        stream = idle.pop()
    except IndexError:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    finally:
        idle.append(stream)
