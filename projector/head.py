"""What goes into a fold for each head, and what comes out."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from projector.method import Expert, Method, Totals
from projector.tensorfile import TensorReader, TensorWriter


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
    keeps of the expert, where it does.
    """

    method: Method
    totals: Totals
    expert: Expert
    before: TensorReader | None
    after: TensorWriter
    prepared: Prepared | None = None
    weights: Sequence[TensorWriter] = ()
    record: TensorWriter | None = None

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
class Folded:
    """What a fold found: the norms of the expert's task vector and of the base (float64), each head's totals after."""

    norm: float
    base_norm: float  # as it was given, or else measured
    totals: Sequence[Totals]
