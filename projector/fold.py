"""The driver: streams one expert through every head, and a head's state out to its published weights.

Each tensor of the expert is read once and folded into all heads; one that every head takes elementwise goes through in
blocks of rows. The calling thread reads, hashes and writes, in order; worker threads compute on a few tensors at a
time, each with single-threaded linear algebra, so that the bits do not depend on their number. What is in memory is
that many tensors (or blocks) of the base, of the expert and of each head's accumulators, however large the model.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import fsum, isfinite, sqrt
from typing import TypeVar

import torch
from torch import Tensor

from projector.errors import BadValues, Reason
from projector.linalg import energy
from projector.method import Expert, Method, State, Sums, Totals
from projector.source import Checkpoint, Source
from projector.spec import Schema, TensorSpec
from projector.tensorfile import TensorReader, TensorWriter
from projector.text import shown
from projector.watch import SILENT, Watch

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class HeadFold:
    """One head in a fold.

    expert: what its method may know of the arriving expert. before: its state's file, None where it has no expert yet.
    after: the file for its new state.
    """

    method: Method
    totals: Totals
    expert: Expert
    before: TensorReader | None
    after: TensorWriter


@dataclass(frozen=True)
class Folded:
    """What a fold found: the expert's norm and the base's (float64), and each head's totals after it."""

    norm: float
    base_norm: float
    totals: Sequence[Totals]


@dataclass(frozen=True)
class Overlap:
    """The norms of an expert's task vector and of the base, and the cosine between it and the merged one (float64)."""

    norm: float
    base_norm: float
    cosine: float


_Part = tuple[TensorSpec, slice | None, Tensor, Tensor, Sequence[Expert]]
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class _FoldedPart:
    """What a worker made of one tensor or block: each head's new state and sums, and the squared norms."""

    spec: TensorSpec
    states: Sequence[State]
    sums: Sequence[Sums]
    energy: float
    base_energy: float
    nbytes: int


@dataclass(frozen=True)
class Driver:
    """How to run: the device, the size of a block in bytes of float32, how many worker threads, and who watches."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    block_bytes: int = BLOCK_BYTES
    workers: int = 1
    watch: Watch = SILENT

    def survey(self, base: Checkpoint, source: Source, method: Method, expert: Expert) -> Expert:
        """Runs the method's survey rounds over the expert and returns `expert` with their sums."""
        for _ in range(method.rounds):
            shares: dict[str, Tensor] = {}
            for spec, rows, _, delta in self._deltas(base, source, [method]):
                share = method.survey(delta, _part(spec, rows), _at(expert, source, spec, rows))
                for key, value in share.items():
                    shares[key] = shares[key] + value if key in shares else value
            expert = replace(expert, surveys=(*expert.surveys, shares))
        return expert

    def fold(self, base: Checkpoint, source: Source, heads: Sequence[HeadFold]) -> Folded:
        """Folds one expert into every head and writes each head's new state.

        Raises BadValues at the first tensor whose delta is not finite; nothing but the heads' new files has then been
        touched.
        """
        done: list[_FoldedPart] = []
        for part in self._in_order(partial(self._fold_part, heads), self._parts(base, source, heads)):
            for head, state in zip(heads, part.states, strict=True):
                for key, value in state.items():
                    head.after.write(slot_name(key, part.spec.name), value, part.spec.start)
            self.watch.advance(part.nbytes)
            done.append(replace(part, states=()))
        totals = [head.method.tally(head.totals, _add([part.sums[i] for part in done])) for i, head in enumerate(heads)]
        return Folded(
            norm=sqrt(fsum(part.energy for part in done)),
            base_norm=sqrt(fsum(part.base_energy for part in done)),
            totals=totals,
        )

    def read_out(
        self,
        base: Checkpoint,
        method: Method,
        totals: Totals,
        state: TensorReader | None,
        writers: Sequence[TensorWriter],
    ) -> None:
        """Writes a head's merged weights, each tensor in the dtype of its writer's spec.

        Raises BadValues where a value does not fit into it.
        """
        parts = (
            (writer, spec, rows, base.read(spec.name, rows))
            for writer in writers
            for spec in writer.specs.values()
            for rows in _blocks(spec, [method], self.block_bytes)
        )
        for writer, spec, weights in self._in_order(partial(self._merged, method, totals, state), parts):
            writer.write(spec.name, weights, spec.start)
            self.watch.advance(weights.numel() * spec.dtype.itemsize)

    def count_finite(self, checkpoint: Checkpoint) -> int:
        """The number of floating values in a checkpoint. Raises BadValues where one is NaN or infinite."""
        count = 0
        for spec in checkpoint.schema.values():
            for rows in _blocks(spec, [], self.block_bytes) if spec.floating else ():
                values = checkpoint.read(spec.name, rows)
                _finite_energy(values, spec)
                count += values.numel()
        return count

    def overlap(self, base: Checkpoint, source: Source, merged: Checkpoint) -> Overlap:
        """Measures an expert against merged weights, for a dry run."""
        mine, theirs, products, origin = [], [], [], []
        for spec, rows, theta0, delta in self._deltas(base, source, []):
            other = merged.delta(spec, theta0, rows)
            with self.watch.phase("project"):
                mine.append(_finite_energy(delta, spec))
                theirs.append(energy(other))
                origin.append(energy(theta0))
                products.append(float(torch.dot(delta.flatten().double(), other.flatten().double())))
            self.watch.advance(delta.numel() * spec.dtype.itemsize)
        norm, merged_norm = sqrt(fsum(mine)), sqrt(fsum(theirs))
        cosine = fsum(products) / (norm * merged_norm) if norm and merged_norm else 0.0
        return Overlap(norm, sqrt(fsum(origin)), cosine)

    def _deltas(
        self, base: Checkpoint, source: Source, methods: Sequence[Method]
    ) -> Iterator[tuple[TensorSpec, slice | None, Tensor, Tensor]]:
        """(spec, rows, theta_0, delta) of every floating tensor, in the expert's own order; in blocks where allowed."""
        schema = base.schema
        for name in source.order:
            for rows in _blocks(schema[name], methods, self.block_bytes):
                theta0 = base.read(name, rows).to(self.device)
                yield schema[name], rows, theta0, source.delta(schema[name], theta0, rows)

    def _state(self, method: Method, file: TensorReader | None, spec: TensorSpec, rows: slice | None) -> State:
        if file is not None:
            return {key: file.read(slot_name(key, spec.name), rows).to(self.device) for key in method.slots(spec)}
        return {
            key: torch.zeros(_shape(slot.shape, rows), dtype=slot.dtype, device=self.device)
            for key, slot in method.slots(spec).items()
        }

    def _parts(self, base: Checkpoint, source: Source, heads: Sequence[HeadFold]) -> Iterator[_Part]:
        for spec, rows, theta0, delta in self._deltas(base, source, [head.method for head in heads]):
            yield spec, rows, theta0, delta, [_at(head.expert, source, spec, rows) for head in heads]

    def _fold_part(self, heads: Sequence[HeadFold], part: _Part) -> _FoldedPart:
        """One tensor, or block of one, through every head; runs in a worker."""
        spec, rows, theta0, delta, experts = part
        states, sums = [], []
        with self.watch.phase("project"):
            delta_energy, base_energy = _finite_energy(delta, spec), energy(theta0)
        for head, expert in zip(heads, experts, strict=True):
            before = self._state(head.method, head.before, spec, rows)
            with self.watch.phase("project"):
                state, found = head.method.update(before, delta, _part(spec, rows), expert)
            states.append(state)
            sums.append(found)
        nbytes = delta.numel() * spec.dtype.itemsize
        return _FoldedPart(_part(spec, rows), states, sums, delta_energy, base_energy, nbytes)

    def _merged(
        self,
        method: Method,
        totals: Totals,
        file: TensorReader | None,
        part: tuple[TensorWriter, TensorSpec, slice | None, Tensor],
    ) -> tuple[TensorWriter, TensorSpec, Tensor]:
        """The merged weights of one tensor, or block of one; runs in a worker. What does not float is the base's."""
        writer, spec, rows, theta0 = part
        if not spec.floating:
            return writer, _part(spec, rows), theta0
        state = self._state(method, file, spec, rows)
        with self.watch.phase("project"):
            merged = method.read(theta0.to(self.device), state, totals, _part(spec, rows)).to(spec.dtype)
            if not isfinite(energy(merged)):
                raise BadValues(
                    Reason.NOT_FINITE,
                    f"the merged {shown(spec.name)} does not fit into {spec.dtype}".replace("torch.", ""),
                    "publish in a wider dtype, or leave this expert out",
                )
        return writer, _part(spec, rows), merged

    def _in_order(self, work: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        """Maps `work` over `items` in the workers, a few ahead, and gives the results in order."""
        with ThreadPoolExecutor(self.workers, "fold", torch.set_num_threads, (1,)) as pool:
            ahead: deque[Future[Out]] = deque()
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def slot_name(slot: str, tensor: str) -> str:
    """The name of an accumulator in a state file: "A/layer.0.weight"."""
    return f"{slot}/{tensor}"


def state_specs(method: Method, schema: Schema) -> list[TensorSpec]:
    """The tensors of a method's state file over a base's schema."""
    return [
        TensorSpec(slot_name(key, name), slot.shape, slot.dtype)
        for name, spec in schema.items()
        if spec.floating
        for key, slot in method.slots(spec).items()
    ]


def _blocks(spec: TensorSpec, methods: Sequence[Method], block_bytes: int) -> Iterator[slice | None]:
    """The blocks of rows of a tensor, or None for the whole of it."""
    rows = max(1, block_bytes // max(1, spec.row_numel * 4))
    if not spec.shape or rows >= spec.shape[0] or not all(method.elementwise(spec) for method in methods):
        yield None
        return
    for start in range(0, spec.shape[0], rows):
        yield slice(start, min(start + rows, spec.shape[0]))


def _part(spec: TensorSpec, rows: slice | None) -> TensorSpec:
    return replace(spec, start=rows.start) if rows else spec


def _shape(shape: tuple[int, ...], rows: slice | None) -> tuple[int, ...]:
    return (rows.stop - rows.start, *shape[1:]) if rows else shape


def _at(expert: Expert, source: Source, spec: TensorSpec, rows: slice | None) -> Expert:
    """The expert as a method sees it at one tensor: with the sidecars that belong to it."""
    sidecars = source.sidecars(spec, rows)
    return replace(expert, sidecars=sidecars) if sidecars else expert


def _finite_energy(delta: Tensor, spec: TensorSpec) -> float:
    found = energy(delta)
    if not isfinite(found):
        raise BadValues(
            Reason.NOT_FINITE,
            f"{shown(spec.name)} holds NaN or infinite values, or its difference to the base overflows",
            "the training diverged, or the file is damaged: drop a checkpoint from before that",
        )
    return found


def _add(shares: Sequence[Sums]) -> dict[str, float]:
    """Adds sums over tensors exactly rounded, so that the order of the tensors does not matter."""
    keys: Mapping[str, None] = dict.fromkeys(key for share in shares for key in share)
    return {key: fsum(share[key] for share in shares if key in share) for key in keys}
