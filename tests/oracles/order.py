"""Oracles of the folds in which an expert's place in the line counts: recency, slerp, magmax, latest, continual_ties.

As in `tests.oracles.rules`: float64, every expert in memory, straight from the formulas, nothing of the package.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.oracles.rules import Weights, task_vector

WEIGHTS: Mapping[str, Callable[[int], float]] = {
    "linear": lambda i: i,
    "sqrt": math.sqrt,
    "log": lambda i: math.log(i + 1),
    "quadratic": lambda i: i**2,
    "cubic": lambda i: i**3,
    "exp": lambda i: 2.0**i,
}


def recency_weights(scheme: str, count: int) -> list[float]:
    """f(1) ... f(count), or f(count) ... f(1) where the scheme is reversed."""
    f = [WEIGHTS[scheme.removeprefix("reverse_")](i) for i in range(1, count + 1)]
    return f[::-1] if scheme.startswith("reverse_") else f


def recency(base: Weights, experts: Sequence[Weights], scheme: str = "linear") -> dict[str, Tensor]:
    """sum f(i) tau_i / sum f(i)."""
    f = recency_weights(scheme, len(experts))
    tasks = [task_vector(base, expert) for expert in experts]
    return {name: sum(w * task[name] for w, task in zip(f, tasks, strict=True)) / sum(f) for name in tasks[0]}  # type: ignore[misc]


def slerp(base: Weights, experts: Sequence[Weights], dot_threshold: float = 0.9995) -> dict[str, Tensor]:
    """m_t = slerp(m_{t-1}, theta_t, 1/t) from m_1 = theta_1; the result is m_T - theta_0."""
    merged = {name: tensor.double() for name, tensor in experts[0].items()}
    for t, expert in enumerate(experts[1:], start=2):
        merged = {name: slerped(merged[name], expert[name].double(), 1 / t, dot_threshold) for name in merged}
    return task_vector(base, merged)


def slerped(a: Tensor, b: Tensor, t: float, dot_threshold: float) -> Tensor:
    """The point at `t` on the arc from a to b; on the straight line where no arc is to be had."""
    straight = (1 - t) * a + t * b
    if not a.any() or not b.any():
        return straight
    dot = float((a / a.norm() * (b / b.norm())).sum())
    if abs(dot) > dot_threshold:
        return straight
    omega = math.acos(dot)
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def magmax(base: Weights, experts: Sequence[Weights], scale: float = 0.5) -> dict[str, Tensor]:
    """scale * the value of largest magnitude of each weight, the newest of those."""
    tasks = [task_vector(base, expert) for expert in experts]
    merged = {}
    for name, first in tasks[0].items():
        columns = zip(*(task[name].flatten().tolist() for task in tasks), strict=True)
        best = [max(enumerate(column), key=lambda entry: (abs(entry[1]), entry[0]))[1] for column in columns]
        merged[name] = scale * torch.tensor(best, dtype=torch.float64).reshape(first.shape)
    return merged


def latest(base: Weights, experts: Sequence[Weights]) -> dict[str, Tensor]:
    """theta_T - theta_0."""
    return task_vector(base, experts[-1])


def continual_ties(
    base: Weights, experts: Sequence[Weights], density: float = 0.2, scale: float = 0.5
) -> dict[str, Tensor]:
    """scale * A, where A = TIES of A and tau for one expert after the other, A = 0 at first.

    A and tau are float32 by definition: which values a threshold keeps, and which sums are zero, depends on it.
    """
    running = {name: torch.zeros_like(tau) for name, tau in task_vector(base, base).items()}
    for expert in experts:
        pair = [trimmed(vector, density) for vector in (running, narrowed(task_vector(base, expert)))]
        total = {name: pair[0][name] + pair[1][name] for name in running}
        majority = sum(int((tensor > 0).sum()) - int((tensor < 0).sum()) for tensor in total.values())
        running = narrowed({name: disjoint_mean([vector[name] for vector in pair], majority) for name in running})
    return {name: scale * tensor for name, tensor in running.items()}


def trimmed(vector: Weights, density: float) -> dict[str, Tensor]:
    """The int(density * d) + 1 values of largest magnitude, and what equals the last of them; the rest is zero."""
    descending = torch.cat([tensor.abs().flatten() for tensor in vector.values()]).sort(descending=True).values
    least = descending[min(int(density * len(descending)), len(descending) - 1)]
    return {name: torch.where(tensor.abs() < least, 0.0, tensor) for name, tensor in vector.items()}


def disjoint_mean(values: Sequence[Tensor], majority: int) -> Tensor:
    """Weight by weight the mean of the values that have the sign of their sum, or of `majority` where that is zero.

    A majority of 0 counts as negative, as in the code that the authors of TIES released.
    """
    merged = []
    for column in zip(*(value.flatten().tolist() for value in values), strict=True):
        elected = math.copysign(1, sum(column)) if sum(column) else majority or -1
        agreeing = [value for value in column if value * elected > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(values[0].shape)


def narrowed(vector: Weights) -> dict[str, Tensor]:
    """Rounded to float32, and float64 again."""
    return {name: tensor.float().double() for name, tensor in vector.items()}
