"""What several of the projector's tests share."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from projector.source import Checkpoint
from projector.tensorfile import RunningDigest, TensorReader

Weights = dict[str, Tensor]
Opens = Callable[..., Checkpoint]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small matrices only lose by threads."""
    yield from _threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """What torch gives a new thread too, unless that asks for one."""
    yield from _threads(2)


def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def opens(tmp_path: Path) -> Iterator[Opens]:
    """Writes tensors into one file and opens it; `told` is the file's metadata, keywords are sidecars."""
    with ExitStack() as closing:

        def reader(name: str, weights: Weights, told: dict[str, str] | None = None) -> TensorReader:
            save_file(weights, tmp_path / name, told)
            fd = os.open(tmp_path / name, os.O_RDONLY)
            closing.callback(os.close, fd)
            return TensorReader(fd, RunningDigest(fd))

        def checkpoint(weights: Weights, told: dict[str, str] | None = None, **sidecars: Weights) -> Checkpoint:
            name = f"{len(os.listdir(tmp_path))}"
            beside = {kind: reader(f"{name}-{kind}", tensors) for kind, tensors in sidecars.items()}
            return Checkpoint([reader(name, weights, told)], beside)

        yield checkpoint
