"""A card without a card: it computes on the CPU, so that all around the CUDA calls can be tried where there is none."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from projector.driver.device import Accelerator
from projector.files.slabs import Slabs
from projector.watch import Watch

MIB = 1 << 20


class PretendCard(Accelerator):
    """Its lanes raise these errors, one after the other, at the end of the work; None is a success, and so is the rest.

    The errors are torch's own classes with the messages that torch gives them.
    """

    def __init__(
        self,
        errors: Sequence[Exception | None] = (),
        budget_bytes: int = 1 << 40,
        probe: Callable[[], None] = lambda: None,
        slabs: Slabs | None = None,
    ) -> None:
        super().__init__(torch.device("cpu", 0), budget_bytes, slabs)  # not equal to CPU: what goes there is copied
        self.errors = list(errors)
        self.lanes = self.cleared = self.probed = 0
        self.threads_seen: set[int] = set()
        self._answer = probe

    @contextmanager
    def lane(self) -> Iterator[None]:
        self.lanes += 1
        self.threads_seen.add(threading.get_ident())
        yield
        if self.errors and (error := self.errors.pop(0)):
            raise error

    def probe(self) -> None:
        self.probed += 1
        self._answer()

    def clear(self) -> None:
        self.cleared += 1


class Listening(Watch):
    """Notes what was computed on the CPU."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.whys: list[str] = []

    def fell_back(self, name: str, why: str) -> None:
        self.names.append(name)
        self.whys.append(why)


def accelerator_error(text: str, code: int) -> RuntimeError:
    """As torch raises it of a call of the CUDA runtime."""
    error: RuntimeError = torch.AcceleratorError(text)
    error.error_code = code  # type: ignore[attr-defined]
    return error


def arena(slabs: int, slab_bytes: int = MIB) -> Slabs:
    """Slabs that nobody has page-locked."""
    return Slabs(torch.empty(slabs * slab_bytes, dtype=torch.uint8), slab_bytes)
