"""Watches the driver: how far it is, how long each kind of work took, and whether it should stop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock
from time import perf_counter

from projector.watch import Watch

PHASES = ("read", "hash", "project", "write", "evaluate", "fsync")


class Abandoned(Exception):
    """The daemon was told to stop, and the expert in hand is let go; it is still in the inbox."""


class Progress(Watch):
    """The progress of one expert: seconds by phase, summed over threads, and the share done, from 0 to 1."""

    def __init__(
        self,
        stopping: Event,
        report: Callable[[float], None],
        fell_back: Callable[[str, str], None] = lambda _, __: None,
    ) -> None:
        self._stopping = stopping
        self._report = report
        self._fell_back = fell_back
        self._adding = Lock()
        self.begin(0)

    def begin(self, total_bytes: int) -> None:
        """Starts over, for work on `total_bytes` of published model."""
        self._total, self._done = total_bytes, 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._report(0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Raises Abandoned once the daemon is to stop: a tensor of many gigabytes is not read to its end first."""
        if self._stopping.is_set():
            raise Abandoned
        started = perf_counter()
        try:
            yield
        finally:
            with self._adding:  # workers time themselves too
                self.seconds[name] += perf_counter() - started

    def advance(self, nbytes: int) -> None:
        if self._stopping.is_set():
            raise Abandoned
        self._done += nbytes
        self._report(min(1.0, self._done / self._total) if self._total else 0.0)

    def goes_on(self) -> None:
        """Shows that the loop does not hang, where there is nothing to count; raises nothing."""
        self._stopping.is_set()

    def fell_back(self, name: str, why: str) -> None:
        self._fell_back(name, why)
