"""The methods that trim or drop, written once more from their formulas: TIES, DARE and model breadcrumbs.

As in `tests.oracles.rules` everything is in memory and nothing of the package is imported. Task vectors are the
float32 ones, so that an equal magnitude is equal here and there and a threshold falls between the same values; all
that follows is float64. `weights` has a weight for each expert. Results are merged task vectors: what is added to the
base.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Vector = dict[str, Tensor]


def ties(
    base: Weights,
    experts: Sequence[Weights],
    weights: Sequence[float],
    density: float = 0.2,
    scope: str = "model",
    combine: str = "mean",
    scale: float = 1.0,
) -> Vector:
    """TIES (arXiv 2306.01708): trim, elect, and merge the values that agree."""
    return elect([trimmed(task_vector(base, expert), density, scope) for expert in experts], weights, combine, scale)


def dare(
    base: Weights,
    experts: Sequence[Weights],
    identities: Sequence[str],
    weights: Sequence[float],
    drop: float = 0.9,
    then: str = "linear",
    scale: float = 0.3,
    density: float = 1.0,
    combine: str = "mean",
    seed: int = 0,
) -> Vector:
    """DARE (arXiv 2311.03099): tau / (1 - drop) where a number of the tensor's own stream is not below `drop`."""
    vectors = []
    for expert, identity in zip(experts, identities, strict=True):
        vector = {}
        for name, tau in task_vector(base, expert).items():
            numbers = splitmix64(key(identity, name, seed), tau.numel())
            kept = torch.tensor([signed(x) >= int(drop * 2**64) - 2**63 for x in numbers], dtype=torch.float64)
            vector[name] = tau * kept.reshape(tau.shape) / (1 - drop)
        vectors.append(vector)
    if then == "linear":
        return add(vectors, weights, scale)
    return elect([trimmed(vector, density, "model") for vector in vectors], weights, combine, scale)


def breadcrumbs(
    base: Weights,
    experts: Sequence[Weights],
    weights: Sequence[float],
    gamma: float = 0.01,
    density: float = 0.9,
    scale: float = 0.3,
) -> Vector:
    """Model breadcrumbs (arXiv 2312.06795): the scaled sum of what lies between outliers and small values."""
    return add([crumbs(task_vector(base, expert), gamma, density) for expert in experts], weights, scale)


def breadcrumbs_ties(
    base: Weights,
    experts: Sequence[Weights],
    weights: Sequence[float],
    gamma: float = 0.01,
    density: float = 0.9,
    combine: str = "mean",
    scale: float = 0.3,
) -> Vector:
    """The values that breadcrumbs keeps, merged by TIES' election."""
    vectors = [crumbs(task_vector(base, expert), gamma, density) for expert in experts]
    return elect(vectors, weights, combine, scale)


def elect(vectors: Sequence[Vector], weights: Sequence[float], combine: str, scale: float) -> Vector:
    """Per weight of the model the sign of the weighted sum, and of the values with that sign their mean, sum or max.

    A sum of zero takes the sign that most weights of the model have, and where that is zero too it is negative, as in
    the code that the authors released. What float64 leaves of values that cancel out is a zero.
    """
    totals = add(vectors, weights, 1.0)
    sizes = add([{name: x.abs() for name, x in vector.items()} for vector in vectors], weights, 1.0)
    totals = {name: total * (total.abs() > 1e-12 * sizes[name]) for name, total in totals.items()}
    majority = sum(int(total.sign().sum()) for total in totals.values())
    merged = {}
    for name, total in totals.items():
        positive = (total > 0) | ((total == 0) & (majority > 0))
        values = torch.stack([vector[name] for vector in vectors])  # (experts, ...)
        weight = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * total.ndim)
        agrees = torch.where(positive, values > 0, values < 0)
        weighted = values * agrees * weight
        if combine == "mean":
            merged[name] = scale * weighted.sum(0) / (agrees * weight).sum(0).where(agrees.any(0), 1)
        elif combine == "sum":
            merged[name] = scale * weighted.sum(0)
        else:
            merged[name] = scale * weighted.abs().amax(0) * torch.where(positive, 1, -1)
    return merged


def trimmed(vector: Vector, density: float, scope: str) -> Vector:
    """The values whose magnitude is at least the (k+1)-th largest, k = int(density * count), of the model or tensor."""
    if scope == "model":
        least = nth_largest(torch.cat([tau.flatten() for tau in vector.values()]), density)
        return {name: tau * (tau.abs() >= least) for name, tau in vector.items()}
    return {name: tau * (tau.abs() >= nth_largest(tau.flatten(), density)) for name, tau in vector.items()}


def nth_largest(values: Tensor, density: float) -> float:
    k = int(density * len(values))
    ordered = sorted(values.abs().tolist(), reverse=True)
    return ordered[min(k, len(values) - 1)] if ordered else 0.0


def crumbs(vector: Vector, gamma: float, density: float) -> Vector:
    """Of each tensor what lies between the first and the last of the values to keep, those equal to them included."""
    kept = {}
    for name, tau in vector.items():
        ordered = sorted(tau.abs().flatten().tolist(), reverse=True)
        rest = ordered[min(int(gamma * len(ordered)), len(ordered) - 1) :]
        rest = rest[: max(1, round(density * len(rest)))]
        kept[name] = tau * ((tau.abs() <= rest[0]) & (tau.abs() >= rest[-1])) if rest else tau.clone()
    return kept


def add(vectors: Sequence[Vector], weights: Sequence[float], scale: float) -> Vector:
    return {name: sum(scale * w * v[name] for w, v in zip(weights, vectors, strict=True)) for name in vectors[0]}


def task_vector(base: Weights, expert: Weights) -> Vector:
    """The float32 task vector, in float64."""
    return {name: (expert[name].float() - tensor.float()).double() for name, tensor in base.items()}


def key(identity: str, name: str, seed: int) -> int:
    """The first eight bytes, most significant first, of the sha256 of a JSON list."""
    return int(hashlib.sha256(json.dumps([identity, name, seed]).encode()).hexdigest()[:16], 16)


def splitmix64(state: int, count: int) -> list[int]:
    """The first numbers of the generator splitmix64, one after the other in Python's whole numbers."""
    mask = 2**64 - 1
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers


def signed(number: int) -> int:
    """A 64-bit number read as two's complement."""
    return number - 2**64 if number >= 2**63 else number
