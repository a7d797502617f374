"""The k-th largest magnitude of a whole model, exact and in constant memory, from two sweeps over its task vector.

The bits of a float32 without its sign are ordered as its magnitude is. The first sweep counts the values by their
upper bits, the second those that share the upper bits of the wanted one by their lower bits. Counts add up over
tensors and blocks of rows, in any order.

    first = sum of coarse(x)                                over the model
    second = sum of fine(x, upper_bits(first, k))           over the model
    least = threshold(first, second, k)

The counts of a tensor of few values are sparse: a model has tens of thousands of them, and bins by the thousand.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import inf

import torch
from torch import Tensor

from projector.algebra.linalg import pieces

LOWER = 16  # bits that the second sweep tells apart
COARSE_BINS = 1 << 31 - LOWER
FINE_BINS = 1 << LOWER
GROUP = 256  # bins
FEW = 2048  # values: fewer than the bins, and sorted faster than those are gone through
MAGNITUDE = (1 << 31) - 1  # all bits but the sign


def kept(density: float, count: int) -> int:
    """How many of `count` values the share `density` keeps, 1 at least; 0 of none.

    TIES' released code takes the (count - k)-th smallest magnitude as the threshold, k = int(density * count), and
    keeps what reaches it: one value more than k.
    """
    return min(int(density * count) + 1, count)


def coarse(x: Tensor) -> Tensor:
    """(COARSE_BINS,) int64: how many values of `x`, float32 of any shape, have each of the possible upper bits."""
    if _few(x):
        return _sparse(
            x.reshape(-1).view(torch.int32).bitwise_right_shift(LOWER).bitwise_and_(COARSE_BINS - 1), COARSE_BINS
        )
    counts = torch.zeros(COARSE_BINS, dtype=torch.int64, device=x.device)
    for bits in _bits(x):
        counts += torch.bincount((bits >> LOWER).bitwise_and_(COARSE_BINS - 1), minlength=COARSE_BINS)
    return counts


def upper_bits(coarse: Tensor, k: int) -> int:
    """The upper bits of the k-th largest magnitude, by the counts of the first sweep."""
    return _from_above(coarse, k)[0]


def fine(x: Tensor, upper: int) -> Tensor:
    """(FINE_BINS,) int64: how many of the values of `x` with these upper bits have each of the possible lower bits."""
    if _few(x):
        lower = (x.reshape(-1).view(torch.int32) & MAGNITUDE).sub_(upper << LOWER)
        return _sparse(lower[(lower >= 0) & (lower < FINE_BINS)], FINE_BINS)
    counts = torch.zeros(FINE_BINS + 2, dtype=torch.int64, device=x.device)
    for bits in _bits(x):
        lower = (bits & MAGNITUDE).sub_(upper << LOWER).clamp_(-1, FINE_BINS)
        counts += torch.bincount(lower.add_(1), minlength=FINE_BINS + 2)
    return counts[1:-1]


def threshold(coarse: Tensor, fine: Tensor, k: int) -> float:
    """The k-th largest magnitude, by the counts of both sweeps; infinite for k = 0.

    What is kept is what reaches it: where several values equal it, all of them, and more than k.
    """
    if not k:
        return inf
    upper, above = _from_above(coarse, k)
    lower, _ = _from_above(fine, k - above)
    return torch.tensor(upper << LOWER | lower, dtype=torch.int32).view(torch.float32).item()


def survey(x: Tensor, density: float, before: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One tensor's share of the two survey rounds that find the threshold; `before` holds the sums of the first."""
    if not before:
        return {"coarse": coarse(x)}
    counts = before[0]["coarse"]
    return {"fine": fine(x, upper_bits(counts, kept(density, int(counts.sum()))))}


def surveyed(density: float, surveys: Sequence[Mapping[str, Tensor]]) -> float:
    """The least magnitude that belongs to the share `density` of the model, by the sums of both survey rounds."""
    first, second = surveys[0]["coarse"], surveys[1]["fine"]
    return threshold(first, second, kept(density, int(first.sum())))


def kth_largest(x: Tensor, *ks: int) -> list[float]:
    """For each k, no more than it has values, the k-th largest magnitude of one tensor; infinite for k = 0."""
    if _few(x):
        magnitudes = x.reshape(-1).abs().sort(descending=True).values
        return [float(magnitudes[k - 1]) if k else inf for k in ks]
    counts = coarse(x)
    return [threshold(counts, fine(x, upper_bits(counts, k)), k) for k in ks]


def just_below(magnitude: float) -> float:
    """The float32 before it: what exceeds that reaches the magnitude. Zero has none before it and stays."""
    return torch.nextafter(torch.tensor(magnitude), torch.tensor(0.0)).item()


def _few(x: Tensor) -> bool:
    return x.numel() <= FEW and not x.is_cuda


def _sparse(bins: Tensor, size: int) -> Tensor:
    """(size,) int64, sparse: how many of the values are each bin."""
    there, counts = torch.unique(bins, return_counts=True)
    return torch.sparse_coo_tensor(there.long()[None], counts, (size,), is_coalesced=True, check_invariants=False)


def _bits(x: Tensor) -> Iterator[Tensor]:
    """The bits of `x` in pieces that stay in the cache."""
    bits = x.reshape(-1).view(torch.int32)
    return (bits[part] for part in pieces(bits))


def _from_above(counts: Tensor, k: int) -> tuple[int, int]:
    """(the bin of the k-th value counted from the last bin down, how many values lie in the bins above it)."""
    rows = counts.to_dense().view(
        -1, GROUP
    )  # first the group of bins, then the bin in it: a running sum over all is slow
    row, above = _last(rows.sum(1), k)
    column, between = _last(rows[row], k - above)
    return row * GROUP + column, above + between


def _last(counts: Tensor, k: int) -> tuple[int, int]:
    """(the last bin that leaves fewer than k values after it, how many those are)."""
    down = counts.flip(0).cumsum(0)
    passed = int(torch.searchsorted(down, k))
    return len(counts) - 1 - passed, int(down[passed - 1]) if passed else 0
