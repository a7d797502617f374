"""How the driver lets its caller watch it: named phases and bytes done. The projector knows no clock and no logger.

A module of its own, below all that reads, computes or writes: each of them takes one.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

Phase = Literal["read", "hash", "project", "write"]


class Watch:
    """Says nothing. Override it to time phases, to show progress, or to raise from `advance` and so stop the work."""

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Entered around one kind of work; phases never nest."""
        return nullcontext()

    def advance(self, nbytes: int) -> None:
        """Called after each piece of work with the bytes of the published model it stood for."""

    def fell_back(self, name: str, why: str) -> None:
        """Called where the device could not take a tensor, which is computed on the CPU."""


SILENT = Watch()
