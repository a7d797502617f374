"""Measures checkpoints without folding them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt

import torch
from torch import Tensor

from projector.algebra.linalg import energy, one_thread
from projector.driver.head import Norms
from projector.driver.steps import BLOCK_BYTES, steps
from projector.errors import BadMerged, BadValues, Reason
from projector.files.source import Checkpoint, Source
from projector.spec import TensorSpec
from projector.text import shown
from projector.watch import SILENT, Watch

PRODUCT_BYTES = 1 << 20  # of one block of one task vector


@dataclass(frozen=True)
class Overlap:
    """The norms of an expert's task vector and of the base, and the cosine between it and the merged one (float64)."""

    task_vector: Norms
    base: Norms
    cosine: float


@dataclass(frozen=True)
class Pair:
    """Two task vectors, a and b, over some tensors of one base: their squared norms and their product (float64)."""

    tensors: int = 0
    parameters: int = 0
    a_energy: float = 0.0
    b_energy: float = 0.0
    product: float = 0.0

    def __add__(self, other: "Pair") -> "Pair":
        return Pair(
            self.tensors + other.tensors,
            self.parameters + other.parameters,
            self.a_energy + other.a_energy,
            self.b_energy + other.b_energy,
            self.product + other.product,
        )

    @property
    def a_norm(self) -> float:
        return sqrt(self.a_energy)

    @property
    def b_norm(self) -> float:
        return sqrt(self.b_energy)

    @property
    def cosine(self) -> float | None:
        """In [-1, 1]; None where one of them is zero."""
        both = self.a_norm * self.b_norm
        return max(-1.0, min(1.0, self.product / both)) if both else None

    @property
    def kept(self) -> float | None:
        """<a, b> / ||a||^2: how far b goes along a, in lengths of a. None where a is zero."""
        return self.product / self.a_energy if self.a_energy else None


def finite_energy(delta: Tensor, spec: TensorSpec) -> float:
    """Its squared norm. Raises BadValues where a value is NaN or infinite."""
    found = energy(delta)
    if not isfinite(found):
        raise BadValues(
            Reason.NOT_FINITE,
            f"{shown(spec.name)} holds NaN or infinite values, or its difference to the base overflows",
            "the training diverged, or the file is damaged: drop a checkpoint from before that",
        )
    return found


def fitted(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`x` in the dtype it is published in. Raises BadMerged, which names `what` it is, where a value does not fit."""
    narrow = x.to(dtype)
    if not isfinite(energy(narrow)):
        raise BadMerged(
            Reason.NOT_FINITE,
            f"{what} does not fit into {dtype}".replace("torch.", ""),
            'set publish.dtype = "float32" and start the daemon again, or leave this expert out',
        )
    return narrow


def product(x: Tensor, y: Tensor) -> float:
    """Their inner product in float64."""
    return float(torch.dot(x.flatten().double(), y.flatten().double()))


def count_finite(checkpoint: Checkpoint) -> int:
    """The number of floating values in a checkpoint. Raises BadValues where one is NaN or infinite."""
    count = 0
    for step in steps(checkpoint.schema, checkpoint.order, [], BLOCK_BYTES):
        finite_energy(checkpoint.read(step.spec.name, step.rows), step.spec)
        count += step.numel
    return count


@one_thread()
def pairs(
    base: Checkpoint,
    a: Source,
    others: Sequence[Checkpoint],
    group: Callable[[str], str],
    watch: Watch = SILENT,
) -> Mapping[str, Sequence[Pair]]:
    """a's task vector beside that of each of the others, by the group that a tensor's name falls into.

    Reads `a` front to back, one block at a time. Raises BadValues as a fold would.
    """
    found: dict[str, list[Pair]] = {}
    for step in steps(base.schema, a.order, [], BLOCK_BYTES):
        theta0 = base.read(step.spec.name, step.rows)
        delta = a.delta(step.spec, theta0, a.fetch(step.spec, step.rows))
        with watch.phase("project"):
            a_energy = finite_energy(delta, step.spec)
        sums = found.setdefault(group(step.spec.name), [Pair()] * len(others))
        for i, other in enumerate(others):
            delta_b = other.delta(step.spec, theta0, other.fetch(step.spec, step.rows))
            with watch.phase("project"):
                sums[i] += Pair(
                    int(step.rows is None or step.rows.start == 0),
                    step.numel,
                    a_energy,
                    energy(delta_b),
                    product(delta, delta_b),
                )
        watch.advance(step.nbytes)
    return found


@one_thread()
def products(
    base: Checkpoint, sources: Sequence[Source], most_bytes: int, watch: Watch = SILENT
) -> tuple[Tensor, float]:
    """The inner products of the task vectors of k sources, (k, k) float64, and of which share of the values.

    most_bytes: how much of a model of the base's dtype is looked at of each: of a larger one every so many blocks, the
    same of all. Reads `sources` block by block, each in the order of the base; holds k blocks. Raises BadValues as a
    fold would.
    """
    names = [name for name, spec in base.schema.items() if spec.merged]
    every = list(steps(base.schema, names, [], PRODUCT_BYTES))
    whole = sum(step.nbytes for step in every)
    share = min(1.0, most_bytes / max(1, whole))
    found = torch.zeros(len(sources), len(sources), dtype=torch.float64)
    due = seen = 0.0
    for step in every:
        due += share * step.nbytes
        if due > 0:
            due -= step.nbytes
            seen += step.nbytes
            theta0 = base.read(step.spec.name, step.rows)
            deltas = [one.delta(step.spec, theta0, one.fetch(step.spec, step.rows)) for one in sources]
            with watch.phase("project"):
                for delta in deltas:
                    finite_energy(delta, step.spec)
                rows = torch.stack([delta.flatten() for delta in deltas]).double()  # (k, numel)
                found += rows @ rows.T
        watch.advance(step.nbytes)
    return found, seen / whole if whole else 1.0


@one_thread()
def overlap(base: Checkpoint, source: Source, merged: Checkpoint, watch: Watch = SILENT) -> Overlap:
    """Measures an expert against merged weights, for a dry run. Raises BadValues as a fold would."""
    mine, theirs, products, origin = [], [], [], []
    for step in steps(base.schema, source.order, [], BLOCK_BYTES):
        theta0 = base.read(step.spec.name, step.rows)
        delta = source.delta(step.spec, theta0, source.fetch(step.spec, step.rows))
        other = merged.delta(step.spec, theta0, merged.fetch(step.spec, step.rows))
        with watch.phase("project"):
            mine.append((step.spec, finite_energy(delta, step.spec)))
            theirs.append(energy(other))
            origin.append((step.spec, energy(theta0)))
            products.append(product(delta, other))
        watch.advance(step.nbytes)
    norms, merged_norm = Norms.of(mine), sqrt(fsum(theirs))
    cosine = fsum(products) / (norms.whole * merged_norm) if norms.whole and merged_norm else 0.0
    return Overlap(norms, Norms.of(origin), cosine)
