"""The driver: streams one expert through every head, and a head's state out to its published weights.

Each tensor of the expert is read once and folded into all heads; one that every head takes elementwise goes through in
blocks of rows. One thread reads ahead, workers compute on a few tensors at a time, on the CPU or on a CUDA device, and
write; the calling thread hashes what they wrote. What is in memory is what those few need, within the budget, however
large the model.

What every head takes elementwise is computed on the CPU whatever the device: it is read, hashed and written there, and
a pass over it in the cache costs less than any of these, while a device would add the way there and back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import fsum
from typing import TypeVar

import torch
from torch import Tensor

from projector.algebra.linalg import energy, on_device, widened
from projector.driver.averages import rule_of
from projector.driver.device import CPU, Device, load, load_each, unload
from projector.driver.head import Folded, HeadFold, Norms
from projector.driver.measure import finite_energy, fitted
from projector.driver.pipeline import Pipeline, never
from projector.driver.steps import BLOCK_BYTES, ROWS, Step, fold_bytes, prepare_bytes, read_bytes, slot_name, steps
from projector.files.source import Checkpoint, Source
from projector.files.tensorfile import Piece, TensorReader, TensorWriter
from projector.method import Contribution, Factors, Method, State, Sums, Survey, Totals
from projector.spec import TensorSpec
from projector.text import shown
from projector.watch import SILENT, Watch

BUDGET_BYTES = 2 << 30
Out = TypeVar("Out")


@dataclass(frozen=True)
class _Read:
    """A step's operands, read: a part of the base, what the expert has for it, how each head sees the expert, and the
    same part of the model that it was trained from, where that is asked for."""

    step: Step
    base: Tensor
    expert: Sequence[Tensor]
    contributions: Sequence[Contribution]
    origin: Tensor | None = None


@dataclass(frozen=True)
class _FoldedPart:
    """What a worker made of one step: what it wrote for the heads, to be hashed, their sums, and the squared norms."""

    step: Step
    written: Sequence[tuple[TensorWriter, Piece]]
    sums: Sequence[Sums]
    energy: float
    base_energy: float


@dataclass(frozen=True)
class Driver:
    """How to run: the device, the size of a block in bytes of float32, how many worker threads, how many bytes all that
    is in hand may take, and who watches."""

    device: Device = field(default_factory=Device)
    block_bytes: int = BLOCK_BYTES
    workers: int = 1
    budget_bytes: int = BUDGET_BYTES
    watch: Watch = SILENT

    def survey(
        self,
        base: Checkpoint,
        source: Source,
        method: Method,
        expert: Contribution,
        before: TensorReader | None,
        origin: Checkpoint | None = None,
    ) -> Contribution:
        """Runs the method's survey rounds over the expert and returns `expert` with their sums.

        before: the state's file, None where there is no expert yet. origin: as of the head's fold.
        """
        for _ in range(method.rounds):
            shares: dict[str, Tensor] = {}
            for step, found in self._pipeline().run(
                steps(base.schema, source.order, [method], self.block_bytes),
                partial(fold_bytes, [method], origin=origin is not None),
                partial(self._read, base, source, [method], [expert], origin),
                partial(self._survey_part, source, method, before),
            ):
                for key, value in found.items():
                    # a copy: to a view, torch adds what is sparse at the wrong place
                    shares[key] = shares[key].add_(value) if key in shares else value.to_dense().clone()
                self.watch.advance(step.nbytes)
            expert = replace(expert, surveys=(*expert.surveys, shares))
        return expert

    def fold(
        self, base: Checkpoint, source: Source, heads: Sequence[HeadFold], base_norms: Norms | None = None
    ) -> Folded:
        """Folds one expert into every head and writes each head's new state, and its weights where it gives them now.

        The norms of the base are measured on the way where they are not given.
        Raises BadValues at a tensor whose delta is not finite; nothing but the heads' new files has then been touched.
        """
        done: list[_FoldedPart] = []
        methods, contributions = [head.method for head in heads], [head.expert for head in heads]
        origin = next((head.origin for head in heads if head.origin), None)
        for part in self._pipeline().run(
            steps(base.schema, source.order, methods, self.block_bytes),
            partial(fold_bytes, methods, origin=origin is not None),
            partial(self._read, base, source, methods, contributions, origin),
            partial(self._fold_part, source, heads, base_norms is None),
        ):
            for writer, piece in part.written:
                writer.hash(piece)
            self.watch.advance(part.step.nbytes)
            done.append(replace(part, written=()))
            part = piece = None  # type: ignore[assignment]  # frees it before the next step is taken in hand
        for head in heads:
            _copy_buffers(base, head.weights)
        totals = [
            head.method.tally(head.totals, added([part.sums[i] for part in done]), head.expert)
            for i, head in enumerate(heads)
        ]
        for head, after in zip(heads, totals, strict=True):
            if head.weights and after != head.foreseen:
                for writer in head.weights:
                    writer.restart()
                self.read_out(base, head.method, after, head.after.reader(), head.weights)
        return Folded(
            Norms.of((part.step.spec, part.energy) for part in done),
            base_norms or Norms.of((part.step.spec, part.base_energy) for part in done),
            totals,
        )

    def prepare(
        self,
        base: Checkpoint,
        method: Method,
        state: TensorReader,
        writer: TensorWriter,
        names: Sequence[str],
        stop: Callable[[], bool] = never,
    ) -> Iterator[str]:
        """Writes what the method prepares from its state for each of these tensors, and gives the names as they are
        done. Once `stop` says so, no further tensor is begun."""

        def work(step: Step, device: torch.device) -> list[Piece]:
            before = self._state(method, state, step, device)
            with self.watch.phase("project"):
                prepared = method.prepare(before, step.spec)
            made = [prepared[key] for key in method.prepares(step.spec)]
            rows = torch.tensor([len(tensor) if tensor.ndim else 1 for tensor in made])
            return [
                writer.put(slot_name(key, step.spec.name), unload(value))
                for key, value in {**prepared, ROWS: rows}.items()
            ]

        for step, pieces in self._pipeline().run(
            steps(base.schema, names, [method], self.block_bytes),
            partial(prepare_bytes, method),
            lambda step: step,
            lambda step: (step, self._run(partial(work, step), step, [method], prepare_bytes(method, step))),
            stop,
        ):
            for piece in pieces:
                writer.hash(piece)
            pieces = piece = None  # type: ignore[assignment]
            yield step.spec.name

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

        def work(writer: TensorWriter, step: Step, theta0: Tensor, device: torch.device) -> tuple[Step, Piece]:
            before = self._state(method, state, step, device)
            merged = self._merged(method, totals, before, load(theta0, device), step, writer.specs)
            return step, writer.put(step.spec.name, merged, step.part.start)

        def compute(writer: TensorWriter, read: tuple[Step, Tensor]) -> tuple[Step, Piece]:
            return self._run(partial(work, writer, *read), read[0], [method], read_bytes(method, read[0]))

        def fetch(step: Step) -> tuple[Step, Tensor]:
            with self._reading(step, [method]):
                return step, base.read(step.spec.name, step.rows)

        for writer in writers:
            names = [name for name, spec in writer.specs.items() if spec.merged]
            for step, piece in self._pipeline().run(
                steps(base.schema, names, [method], self.block_bytes),
                partial(read_bytes, method),
                fetch,
                partial(compute, writer),
            ):
                writer.hash(piece)
                piece = None  # type: ignore[assignment]
                self.watch.advance(step.nbytes)
        _copy_buffers(base, writers)

    def _pipeline(self) -> Pipeline:
        return Pipeline(self.workers, self.budget_bytes, self.device.threads)

    def _run(self, work: Callable[[torch.device], Out], step: Step, methods: Sequence[Method], need: int) -> Out:
        """work(device), or work(CPU) where it is none of the device's. need: what the step takes on the CPU."""
        if _elementwise(step, methods):
            return work(CPU)
        return self.device.run(work, on_device(step.numel, need), step.spec.name, self.watch)

    def _reading(self, step: Step, methods: Sequence[Method]) -> AbstractContextManager[None]:
        return nullcontext() if _elementwise(step, methods) else self.device.reading()

    def _read(
        self,
        base: Checkpoint,
        source: Source,
        methods: Sequence[Method],
        contributions: Sequence[Contribution],
        origin: Checkpoint | None,
        step: Step,
    ) -> _Read:
        with self._reading(step, methods):
            sidecars = source.sidecars(step.spec, step.rows)
            return _Read(
                step,
                base.read(step.spec.name, step.rows),
                source.fetch(step.spec, step.rows),
                [
                    replace(contribution, sidecars=sidecars) if sidecars else contribution
                    for contribution in contributions
                ],
                # an average of statistics is one of the experts' own, wherever they were trained
                None if origin is None or step.spec.statistic else origin.read(step.spec.name, step.rows),
            )

    def _survey_part(
        self, source: Source, method: Method, before: TensorReader | None, read: _Read
    ) -> tuple[Step, Survey]:
        if read.step.spec.statistic:
            return read.step, {}

        def work(device: torch.device) -> Survey:
            state = self._state(method, before, read.step, device) if method.surveys_state else {}
            with self.watch.phase("project"):
                _, delta, since, _ = _deltas(source, read, device, factored=False)
                delta = delta if since is None else since
                contribution = replace(
                    read.contributions[0], sidecars=load_each(read.contributions[0].sidecars, device)
                )
                found = method.survey(state, delta, read.step.part, contribution)
                return {key: unload(value) for key, value in found.items()}

        need = fold_bytes([method], read.step, origin=read.origin is not None)
        return read.step, self._run(work, read.step, [method], need)

    def _fold_part(self, source: Source, heads: Sequence[HeadFold], measure: bool, read: _Read) -> _FoldedPart:
        work = partial(self._fold_on, source, heads, measure, read)
        methods = [head.method for head in heads]
        need = fold_bytes(methods, read.step, origin=read.origin is not None)
        return self._run(work, read.step, methods, need)

    def _fold_on(
        self, source: Source, heads: Sequence[HeadFold], measure: bool, read: _Read, device: torch.device
    ) -> _FoldedPart:
        """One step through every head; runs in a worker. `measure`: the base's norms too."""
        step, sums = read.step, []
        written: list[tuple[TensorWriter, Piece]] = []
        with self.watch.phase("project"):
            rules = [rule_of(head.method, step.spec) for head in heads]
            matrix = any(not rule.elementwise(step.spec) for rule in rules)
            theta0, from_base, since, factors = _deltas(source, read, device, factored=matrix)
            delta_energy, base_energy = finite_energy(from_base, step.spec), energy(theta0) if measure else 0.0
            since_energy = 0.0 if since is None else finite_energy(since, step.spec)
        for head, rule, contribution in zip(heads, rules, read.contributions, strict=True):
            relative = since is not None and head.origin is not None
            delta = since if since is not None and relative else from_base
            before = self._state(head.method, head.before, step, device)
            ready = self._prepared(head, step, device)
            with self.watch.phase("project"):
                prepared = ready if ready is not None else rule.prepare(before, step.spec)
                sidecars = load_each(contribution.sidecars, device)
                contribution = replace(contribution, sidecars=sidecars, factors=None if relative else factors)
                known = {"base": widened(theta0)} if rule.wants_base else {}
                state, found = rule.update({**before, **prepared, **known}, delta, step.part, contribution)
                outcome = [(head.after, state)]
                if head.record:
                    outcome.append((head.record, rule.keep(delta, step.part, contribution)))
                sums.append(
                    found
                    if step.spec.statistic
                    else {"task_vector": since_energy if relative else delta_energy, **found}
                )
            for file, tensors in outcome:
                for key, value in tensors.items():
                    piece = file.put(slot_name(key, step.spec.name), unload(value), step.part.start)
                    written.append((file, piece))
            for writer in head.weights_of.get(step.spec.name, ()):
                merged = self._merged(head.method, head.foreseen, state, theta0, step, writer.specs)
                written.append((writer, writer.put(step.spec.name, merged, step.part.start)))
        return _FoldedPart(step, written, sums, delta_energy, base_energy)

    def _state(self, method: Method, file: TensorReader | None, step: Step, device: torch.device) -> State:
        slots = rule_of(method, step.spec).slots(step.spec)
        if file is not None:
            return {key: load(file.read(slot_name(key, step.spec.name), step.rows), device) for key in slots}
        return {key: torch.zeros(step.shape_of(slot), dtype=slot.dtype, device=device) for key, slot in slots.items()}

    def _prepared(self, head: HeadFold, step: Step, device: torch.device) -> State | None:
        """What is ready for this step; None where it must be worked out now."""
        if head.prepared is None or step.spec.name not in head.prepared.ready:
            return None
        file, name = head.prepared.file, step.spec.name
        rows: list[int] = file.read(slot_name(ROWS, name)).tolist()
        return {
            key: load(file.read(slot_name(key, name), slice(0, there)), device)
            for key, there in zip(rule_of(head.method, step.spec).prepares(step.spec), rows, strict=True)
        }

    def _merged(
        self, method: Method, totals: Totals, state: State, theta0: Tensor, step: Step, specs: Mapping[str, TensorSpec]
    ) -> Tensor:
        """The merged weights of one step, in the dtype they are published in."""
        dtype = specs[step.spec.name].dtype
        with self.watch.phase("project"):
            merged = rule_of(method, step.spec).read(widened(theta0), state, totals, step.part)
            narrow = fitted(merged, dtype, f"the merged {shown(step.spec.name)}")
        return unload(narrow)


def _deltas(
    source: Source, read: _Read, device: torch.device, factored: bool
) -> tuple[Tensor, Tensor, Tensor | None, Factors | None]:
    """(theta_0, theta - theta_0, theta less what it was trained from if that was read, the factors of theta - theta_0
    where it has any and they are wanted) of one step, on the device."""
    spec, rows = read.step.spec, read.step.rows
    theta0, fetched = load(read.base, device), [load(tensor, device) for tensor in read.expert]
    factors = source.factors(spec, fetched) if factored else None
    since = None
    if read.origin is not None:
        since = source.delta(spec, load(read.origin, device), [tensor.clone() for tensor in fetched])
        own = source.own_rows(spec, rows)
        if own is not None:  # what it has not itself, nobody trained
            (since[own:] if since.ndim else since).zero_()
    return theta0, source.delta(spec, theta0, fetched), since, factors


def _elementwise(step: Step, methods: Sequence[Method]) -> bool:
    return all(rule_of(method, step.spec).elementwise(step.spec) for method in methods)


def _copy_buffers(base: Checkpoint, writers: Sequence[TensorWriter]) -> None:
    """What is not merged is the base's."""
    for writer in writers:
        for name, spec in writer.specs.items():
            if not spec.merged:
                writer.write(name, base.read(name))


def added(shares: Sequence[Sums]) -> dict[str, float]:
    """Sums over tensors added up, exactly rounded, so that the order of the tensors does not matter."""
    keys: Mapping[str, None] = dict.fromkeys(key for share in shares for key in share)
    return {key: fsum(share[key] for share in shares if key in share) for key in keys}
