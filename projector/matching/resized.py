"""A vocabulary of another size: which rows an expert and the base both have.

Who adds tokens appends rows, and who trims padding takes the last ones away; the rows before keep their tokens. Who
builds another vocabulary, or another label set, gives the same rows other meanings. Names and shapes do not tell the
two apart, but the rows do: one that was only fine-tuned still lies nearest to itself.
"""

from collections.abc import Sequence

import torch

from projector.files.source import Checkpoint
from projector.spec import LEAST_ROWS, resized_rows

SAMPLED = 64  # rows
AT_HOME = 0.9  # of those sampled


def common_rows(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """The tensors, by their names in the base, that have more or fewer rows in the expert, and as far as both have them
    the same ones.

    Matrices are looked at; a vector follows a matrix that has as many rows as it in the base and in the expert.
    """
    ours, theirs = base.schema, expert.schema
    others = [name for name in theirs if name in ours and ours[name].merged and theirs[name].shape != ours[name].shape]
    found = [
        name for name in others if resized_rows(ours[name].shape, theirs[name].shape) and _same_rows(base, expert, name)
    ]
    sizes = {(ours[name].shape[0], theirs[name].shape[0]) for name in found}
    vectors = [name for name in others if len(ours[name].shape) == len(theirs[name].shape) == 1]
    return found + [name for name in vectors if (ours[name].shape[0], theirs[name].shape[0]) in sizes]


def spread(rows: int) -> Sequence[int]:
    """Some of these rows, two or more, the first and the last among them."""
    count = min(rows, SAMPLED)
    return [place * (rows - 1) // (count - 1) for place in range(count)]


def _same_rows(base: Checkpoint, expert: Checkpoint, name: str) -> bool:
    rows = min(base.schema[name].shape[0], expert.schema[name].shape[0])
    if rows < LEAST_ROWS:
        return False
    places = spread(rows)
    ours_KN, theirs_KN = base.sample(name, places), expert.sample(name, places)
    apart_KK = torch.cdist(theirs_KN, ours_KN, compute_mode="donot_use_mm_for_euclid_dist")
    at_home_K = apart_KK.diagonal() <= apart_KK.min(1).values
    return bool(at_home_K.double().mean() >= AT_HOME)
