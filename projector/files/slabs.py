"""Host memory for tensors on their way to and from a device: page-locked once, cut into slabs, used again and again.

Page-locking takes longer than reading, and what torch locks by itself it rounds up to powers of two and keeps for ever.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SLAB_BYTES = 4 << 20
LEAST_BYTES = 1 << 16  # what is smaller than that is not worth a slab
_here = threading.local()


class Slabs:
    """Slabs of an arena, lent to tensors. arena: uint8, page-locked where a device is to copy from it."""

    def __init__(self, arena: Tensor, slab_bytes: int = SLAB_BYTES) -> None:
        self._arena = arena.numpy()
        self._slab_bytes = slab_bytes
        self._free = [True] * (len(self._arena) // slab_bytes)
        self._taking = threading.Lock()
        self._returned: deque[slice] = deque()  # a finalizer may run anywhere, even in `take`: it takes no lock

    @property
    def nbytes(self) -> int:
        return len(self._free) * self._slab_bytes

    @property
    def free_bytes(self) -> int:
        with self._taking:
            self._collect()
            return sum(self._free) * self._slab_bytes

    def take(self, nbytes: int) -> Tensor | None:
        """Bytes in neighbouring slabs, uint8; None where there are not so many. They are free again once no tensor
        looks at them."""
        count = -(-nbytes // self._slab_bytes)
        with self._taking:
            self._collect()
            start = self._run(count)
            if start is None:
                return None
            run = slice(start, start + count)
            self._free[run] = [False] * count
        lent = self._arena[start * self._slab_bytes :][:nbytes]
        weakref.finalize(lent, self._returned.append, run)
        return torch.from_numpy(lent)  # whose storage holds on to `lent`

    @contextmanager
    def lent(self) -> Iterator[None]:
        """What this thread makes by `empty` lies in these slabs while the block lasts, as far as they go."""
        before = getattr(_here, "slabs", None)
        _here.slabs = self
        try:
            yield
        finally:
            _here.slabs = before

    def _collect(self) -> None:
        while self._returned:
            run = self._returned.popleft()
            self._free[run] = [True] * (run.stop - run.start)

    def _run(self, count: int) -> int | None:
        """Where the first `count` neighbouring free slabs begin."""
        found = 0
        for index, free in enumerate(self._free):
            found = found + 1 if free else 0
            if found == count:
                return index + 1 - count
        return None


def empty(nbytes: int) -> Tensor:
    """Fresh bytes on the host, uint8: in this thread's slabs where it has any, and they suffice."""
    slabs: Slabs | None = getattr(_here, "slabs", None)
    taken = slabs.take(nbytes) if slabs is not None and nbytes >= LEAST_BYTES else None
    return torch.empty(nbytes, dtype=torch.uint8) if taken is None else taken
