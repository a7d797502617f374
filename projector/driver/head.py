"""What goes into a fold for each head, and what comes out."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, sqrt
from typing import Self

from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.method import Contribution, Method, Totals
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Prepared:
    """What a head's method prepared from its state, as far as it is ready: a file, and the tensors that are in it."""

    file: TensorReader
    ready: Container[str]


@dataclass(frozen=True)
class HeadFold:
    """One head in a fold.

    expert: what its method may know of the arriving expert. before: its state's file, None where it has no expert yet.
    after: the file for its new state. prepared: what is ready of its method's `prepare`. weights: the files for the
    merged weights, where the method gives them in the same sweep (`one_sweep`). record: the file for what its method
    keeps of the expert, where it does. origin: the model that the expert was trained from, where the head's task vector
    is what was trained since, and not the way from the base; the same for all heads of a fold that have one.
    """

    method: Method
    totals: Totals
    expert: Contribution
    before: TensorReader | None
    after: TensorWriter
    prepared: Prepared | None = None
    weights: Sequence[TensorWriter] = ()
    record: TensorWriter | None = None
    origin: Checkpoint | None = None

    @cached_property
    def weights_of(self) -> Mapping[str, Sequence[TensorWriter]]:
        """The files for the merged weights by the tensors that are in them."""
        files: dict[str, list[TensorWriter]] = {}
        for writer in self.weights:
            for name in writer.specs:
                files.setdefault(name, []).append(writer)
        return files

    @property
    def foreseen(self) -> Totals:
        """The totals after this expert, as the method tells them before it is read."""
        return self.method.tally(self.totals, {}, self.expert)


@dataclass(frozen=True)
class Norms:
    """Of a model, or of a task vector (float64): of all of it, and the squares of those of its tensors, by name; of
    these without its vectors, which are ones or zeros in models that have nothing in common (a norm's parameters).

    sizes: their numbers of elements.
    """

    whole: float
    energies: Mapping[str, float]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, parts: Iterable[tuple[TensorSpec, float]]) -> Self:
        """From the squared norm of each tensor, or of each part of one."""
        found = list(parts)
        energies: dict[str, float] = {}
        for spec, energy in found:
            if not spec.vector:
                energies[spec.name] = energies.get(spec.name, 0.0) + energy
        sizes = {spec.name: spec.numel for spec, _ in found if not spec.vector}
        return cls(sqrt(fsum(energy for _, energy in found)), energies, sizes)

    def over(self, base: Self) -> float:
        """How many times as long as the base's it is, in over half of its elements: each tensor counts by itself, so
        that none, however long, speaks for the others. A tensor of zeros in the base does not count."""
        ratios = {name: sqrt(self.energies[name] / energy) for name, energy in base.energies.items() if energy}
        half, there = sum(self.sizes[name] for name in ratios) / 2, 0
        for name in sorted(ratios, key=lambda name: -ratios[name]):
            there += self.sizes[name]
            if there > half:
                return ratios[name]
        return 0.0


@dataclass(frozen=True)
class Folded:
    """What a fold found: the norms of the expert's task vector and of the base, each head's totals after."""

    task_vector: Norms
    base: Norms  # as it was given, or else measured
    totals: Sequence[Totals]
