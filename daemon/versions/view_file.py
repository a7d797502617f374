"""One expert's view of one version, as the file that a loader reads, computed as it is sent.

Nothing of it is ever on the disk, and in memory no more than a block. What it reads is open from the start: retention
may remove the version meanwhile.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from daemon.checkpoints.checkpoint import open_path
from daemon.layout import STATE_FILE, Home
from daemon.versions.weight_files import METADATA
from daemon.versions.writing import published_specs
from projector.driver.view import View
from projector.files.header import build_header
from projector.files.tensorfile import TensorReader
from projector.method import Sums
from projector.methods import make
from registry.records import Head, Version


class OpenView:
    """A view held open. Close it, or use it as a context manager.

    Raises FileNotFoundError where the version's state is gone, or where nothing is kept of the expert.
    """

    def __init__(self, home: Home, head: Head, version: Version, dtype: str, expert_version: int) -> None:
        with ExitStack() as closing:
            state = _open(home.head_state(head.name, version.number) / STATE_FILE, closing)
            record = _open(home.view_record(head.name, expert_version), closing)
            base = closing.enter_context(open_path(home.base))
            self._view = View(base.tensors, make(head.method, head.params), state, record)
            self._opening, self._header = build_header(published_specs(base.tensors.schema, dtype), METADATA)
            self._closing = closing.pop_all()

    @property
    def size(self) -> int:
        """The bytes of the whole file."""
        return self._header.size

    def sums(self) -> Sums:
        """What `chunks` needs; it takes a sweep over the state, and never changes."""
        return self._view.sums()

    def chunks(self, sums: Sums) -> Iterator[bytes]:
        """The bytes of the safetensors file, front to back. Raises BadValues as the projector's View does."""
        yield self._opening
        for _, tensor in self._view.weights(self._header.specs, sums):
            yield _bytes(tensor)

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: os.PathLike[str], closing: ExitStack) -> TensorReader:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    closing.callback(os.close, fd)
    return TensorReader(fd)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
