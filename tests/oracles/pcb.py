"""Oracle of PCB-Merging (arXiv 2410.02396), and of its one-pass form.

As in `tests.oracles.rules`: float64, every expert in memory, straight from the formulas, nothing of the package.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracles.rules import Weights, task_vector


def pcb(base: Weights, experts: Sequence[Weights], ratio: float = 0.1, scale: float = 1.0) -> dict[str, Tensor]:
    """The offline method: every expert is scored with T and S of them all."""
    vectors = flat(base, experts)
    total = vectors.sum(0)
    shares = torch.stack([share(tau, total, len(experts), ratio) for tau in vectors])
    return unflat(base, average(vectors, shares, scale))


def pcb_on_arrival(
    base: Weights, experts: Sequence[Weights], ratio: float = 0.1, scale: float = 1.0
) -> dict[str, Tensor]:
    """Each expert is scored with T and S as they are when it comes."""
    vectors = flat(base, experts)
    shares = [share(tau, vectors[: t + 1].sum(0), t + 1, ratio) for t, tau in enumerate(vectors)]
    return unflat(base, average(vectors, torch.stack(shares), scale))


def average(vectors: Tensor, shares: Tensor, scale: float) -> Tensor:
    """scale * sum share tau / sum share, with each tau's magnitudes clamped."""
    clamped = torch.stack([tau.sign() * clamp(tau.abs(), 1e-4, 1e-4) for tau in vectors])
    return scale * (clamped * shares).sum(0) / shares.sum(0).clamp(min=1e-12)


def share(tau: Tensor, total: Tensor, count: int, ratio: float) -> Tensor:
    """norm of the scores, of which the lower ones were raised to the least of the best."""
    within = torch.exp(count * normalised(clamp(tau.abs(), 1e-4, 1e-4)) ** 2)
    score = within * torch.tanh(tau * total)
    return normalised(clamp(score, 1 - ratio, 0))


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Clamps the shares `low` and `high` of the values, at either end."""
    order = x.sort().values
    d = len(x)
    return x.clamp(order[min(int(d * low), d - 1)], order[max(0, int(d * (1 - high) - 1))])


def normalised(x: Tensor) -> Tensor:
    """From 0 to 1; 0 where all are equal."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


def flat(base: Weights, experts: Sequence[Weights]) -> Tensor:
    """(T, d): each task vector as one vector."""
    return torch.stack([torch.cat([t.flatten() for t in task_vector(base, expert).values()]) for expert in experts])


def unflat(base: Weights, vector: Tensor) -> dict[str, Tensor]:
    """base + vector."""
    merged = dict(base)
    start = 0
    for name, tensor in base.items():
        if tensor.is_floating_point():
            part = vector[start : start + tensor.numel()].reshape(tensor.shape)
            merged[name] = tensor.double() + part
            start += tensor.numel()
    return merged
