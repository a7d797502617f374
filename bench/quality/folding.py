"""A stream of experts through the driver, in this process: real files, a fold and a read-out an arrival.

It is what the daemon runs for every arrival, without its registry and its disk: `mainstem study` does the same with a
home, and starts the evaluator anew for each version.
"""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Self

from torch import Tensor

from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from projector.driver.fold import Driver
from projector.driver.head import HeadFold
from projector.driver.routed import RoutedModel
from projector.driver.steps import record_specs, state_bytes, state_specs
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.method import Contribution, Method, Totals
from projector.methods.smile import Smile


@dataclass(frozen=True)
class Cost:
    """Of one arrival, with its read-out. seconds: of the wall; cpu_seconds: of this process. state_bytes: kept."""

    seconds: float
    cpu_seconds: float
    state_bytes: int


class Stream:
    """One method over a base. Use it as a context manager; its files have no names and go with it."""

    def __init__(self, method: Method, base: Path) -> None:
        self.method, self._path, self._driver = method, base, Driver()
        self._totals = Totals()
        self._state: TensorReader | None = None
        self.costs: list[Cost] = []

    def __enter__(self) -> Self:
        self._files = ExitStack()
        self._base: Checkpoint = self._files.enter_context(open_path(self._path)).tensors
        self._out = TensorWriter(self._new(self._files), list(self._base.schema.values()), {})
        self._held = ExitStack()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        self._files.close()

    @property
    def count(self) -> int:
        """How many experts were folded."""
        return self._totals.experts

    def take(self, path: Path, *, origin: Path | None = None) -> None:
        """Folds one expert. origin: what it was trained from, where its task vector is what was trained since."""
        method, wall, cpu = self.method, monotonic(), process_time()
        with ExitStack() as opened:
            expert: OpenCheckpoint = opened.enter_context(open_path(path, needs=method.needs))
            expert.check(self._base)
            source = expert.tensors
            since = opened.enter_context(open_path(origin)).tensors if origin else None
            told = Contribution(self.count + 1, sha256=expert.identity() if method.keyed else "")
            told = self._driver.survey(self._base, source, method, told, self._state, since)
            held = ExitStack()
            after = TensorWriter(self._new(held), state_specs(method, self._base.schema), {})
            records = record_specs(method, self._base.schema)
            record = TensorWriter(self._new(opened), records, {}) if records else None
            now = [self._out] if method.one_sweep else []
            head = HeadFold(method, self._totals, told, self._state, after, None, now, record, since)
            self._totals = self._driver.fold(self._base, source, [head]).totals[0]
        self._held.close()
        self._held, self._state = held, after.reader()
        if not method.one_sweep:
            self._driver.read_out(self._base, method, self._totals, self._state, [self._out])
        size = state_bytes(method, self._base.schema)
        self.costs.append(Cost(monotonic() - wall, process_time() - cpu, size))

    def weights(self) -> dict[str, Tensor]:
        """The merged model."""
        found = self._out.reader()
        return {name: found.read(name) for name in found.specs}

    def routed(self) -> RoutedModel:
        """What `mainstem export` would write after this arrival; of smile alone."""
        assert isinstance(self.method, Smile) and self._state is not None
        return RoutedModel(self._base, self.method, self._state, self._totals)

    def figures(self) -> Mapping[str, float]:
        """What the method tells of itself."""
        return self.method.figures(self._totals)

    def _new(self, held: ExitStack) -> int:
        return held.enter_context(tempfile.TemporaryFile()).fileno()
