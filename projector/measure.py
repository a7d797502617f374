"""Measures checkpoints without folding them."""

from dataclasses import dataclass
from math import fsum, isfinite, sqrt

import torch
from torch import Tensor

from projector.errors import BadValues, Reason
from projector.linalg import energy
from projector.source import Checkpoint, Source
from projector.spec import TensorSpec
from projector.steps import BLOCK_BYTES, steps
from projector.text import shown
from projector.watch import SILENT, Watch


@dataclass(frozen=True)
class Overlap:
    """The norms of an expert's task vector and of the base, and the cosine between it and the merged one (float64)."""

    norm: float
    base_norm: float
    cosine: float


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


def count_finite(checkpoint: Checkpoint) -> int:
    """The number of floating values in a checkpoint. Raises BadValues where one is NaN or infinite."""
    count = 0
    for step in steps(checkpoint.schema, checkpoint.order, [], BLOCK_BYTES):
        finite_energy(checkpoint.read(step.spec.name, step.rows), step.spec)
        count += step.numel
    return count


def overlap(base: Checkpoint, source: Source, merged: Checkpoint, watch: Watch = SILENT) -> Overlap:
    """Measures an expert against merged weights, for a dry run. Raises BadValues as a fold would."""
    mine, theirs, products, origin = [], [], [], []
    for step in steps(base.schema, source.order, [], BLOCK_BYTES):
        theta0 = base.read(step.spec.name, step.rows)
        delta = source.delta(step.spec, theta0, source.fetch(step.spec, step.rows))
        other = merged.delta(step.spec, theta0, merged.fetch(step.spec, step.rows))
        with watch.phase("project"):
            mine.append(finite_energy(delta, step.spec))
            theirs.append(energy(other))
            origin.append(energy(theta0))
            products.append(float(torch.dot(delta.flatten().double(), other.flatten().double())))
        watch.advance(step.nbytes)
    norm, merged_norm = sqrt(fsum(mine)), sqrt(fsum(theirs))
    cosine = fsum(products) / (norm * merged_norm) if norm and merged_norm else 0.0
    return Overlap(norm, sqrt(fsum(origin)), cosine)
