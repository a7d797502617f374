"""Merging rules written once more, straight from their formulas, to judge the streaming ones by.

Everything is float64 and every expert is in memory: slow and plain on purpose. Nothing of the package is imported, so
that an error in `projector` cannot hide in its own judge.

An expert is a dict with the base's tensor names and shapes. Tensors that are not floating come from the base. Every
name counts in the norms, so a tied tensor must be given under one name only. Results are float64.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Projection = Literal["code", "paper", "lead"]

DEFAULT_EXCLUDE = ("*embed*", "*wte*", "*wpe*", "shared.weight", "*relative_attention_bias*")


def opcm(
    base: Weights,
    experts: Sequence[Weights],
    alpha: float = 0.5,
    projection: Projection = "code",
    tol: float = 1e-6,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """OPCM (arXiv 2501.09522) with the whole singular value decomposition.

    A_t = A_{t-1} + P(tau_t; A_{t-1}); the result is base + A_T * mean_t norm(tau_t) / norm(A_T).
    """
    total = {name: torch.zeros_like(weight) for name, weight in _floating(base).items()}
    norms = []
    for expert in experts:
        task = task_vector(base, expert)
        norms.append(norm(task))
        for name, tau in task.items():
            total[name] += _projected(name, tau, total[name], alpha, projection, tol, exclude)
    length = norm(total)
    scale = sum(norms) / len(norms) / length if length > 0 else 0.0
    return _plus(base, total, scale)


def mean(base: Weights, experts: Sequence[Weights], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """theta_0 + S / sum w_i, S = sum w_i tau_i; without `weights` each is 1."""
    counts = weights or [1.0] * len(experts)
    return _plus(base, task_sum(base, experts, counts), 1 / sum(counts) if experts else 0.0)


def task_arithmetic(
    base: Weights,
    experts: Sequence[Weights],
    scale: float | Literal["norm", "per_sqrt"] = 0.3,
    coefficient: float = 1.0,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """theta_0 + scale * S, S = sum w_i tau_i; without `weights` each is 1.

    "norm" is the weighted mean of norm(tau_i) over norm(S), "per_sqrt" is `coefficient` / sqrt(T).
    """
    counts = weights or [1.0] * len(experts)
    total = task_sum(base, experts, counts)
    if not experts:
        return _plus(base, total, 0.0)
    if scale == "norm":
        length = norm(total)
        lengths = [norm(task_vector(base, expert)) for expert in experts]
        mean_length = sum(c * x for c, x in zip(counts, lengths, strict=True)) / sum(counts)
        factor = mean_length / length if length > 1e-12 * sum(counts) * mean_length else 0.0
    elif scale == "per_sqrt":
        factor = coefficient / math.sqrt(len(experts))
    else:
        factor = float(scale)
    return _plus(base, total, factor)


def ema(
    base: Weights, experts: Sequence[Weights], weight: float = 0.5, start: Literal["base", "first"] = "base"
) -> dict[str, Tensor]:
    """run_t = weight * theta_t + (1 - weight) * run_{t-1}, run_0 = theta_0; or run_1 = theta_1 without theta_0."""
    old, others = _floating(base), list(experts)
    if start == "first" and others:
        first = others.pop(0)
        old = {name: first[name].double() for name in old}
    for expert in others:
        new = {name: expert[name].double() for name in old}
        old = {name: weight * new[name] + (1 - weight) * old[name] for name in old}
    return {name: old[name] if name in old else tensor.clone() for name, tensor in base.items()}


def task_vector(base: Weights, expert: Weights) -> dict[str, Tensor]:
    """tau = theta - theta_0 over the floating tensors."""
    return {name: expert[name].double() - weight for name, weight in _floating(base).items()}


def task_sum(base: Weights, experts: Sequence[Weights], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """S = sum of w_i tau_i; without `weights` each is 1."""
    total = {name: torch.zeros_like(weight) for name, weight in _floating(base).items()}
    for expert, count in zip(experts, weights or [1.0] * len(experts), strict=True):
        for name, tau in task_vector(base, expert).items():
            total[name] += count * tau
    return total


def norm(vector: Weights) -> float:
    """Euclidean norm of all the tensors taken as one vector."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in vector.values()))


def project(tau: Tensor, old: Tensor, alpha: float, projection: Projection, tol: float) -> Tensor:
    """P(tau; old) for one matrix (m, n): remove from `tau` what would overwrite `old`.

    M = U' tau V in the full singular basis of `old`. Directions with s_i <= tol * s_0 carry nothing of `old`: they take
    no part in the shares and nothing is removed along them. "lead": beside the leading block only what lies along the
    rest of `old`.
    """
    u, s, vh = torch.linalg.svd(old, full_matrices=True)  # (m, m), (min(m, n),), (n, n)
    if s.numel() == 0 or s[0] == 0:
        return tau.clone()
    kept = int((s > tol * s[0]).sum())
    mass = s[:kept].cumsum(0)
    share = mass / mass[-1]
    if projection == "lead":
        rank = int((share <= alpha).sum())
        left, right = u[:, :rank], vh[:rank]
        tail = old - (left * s[:rank]) @ right
        rest: Tensor = tau - left @ (left.T @ tau @ right.T) @ right
        if rank < kept:
            rest = rest - (tau * tail).sum() / tail.square().sum() * tail
        return rest
    core = u.T @ tau @ vh.T  # (m, n)
    core[range(kept), range(kept)] = 0
    if projection == "code":
        rank = int((share <= alpha).sum())
        core[:rank, :rank] = 0
    else:
        rank = int((share < alpha).sum()) + 1 if alpha > 0 else 0
        core[:rank, :] = 0
        core[:, :rank] = 0
    cleaned: Tensor = u @ core @ vh
    return cleaned


def is_projected(name: str, tensor: Tensor, exclude: Sequence[str]) -> bool:
    """Whether OPCM projects this tensor: a matrix, or a stack of them, with both sides >= 2 and no excluded name."""
    return (
        tensor.ndim in (2, 3) and min(tensor.shape[-2:]) >= 2 and not any(fnmatchcase(name, glob) for glob in exclude)
    )


def _projected(
    name: str, tau: Tensor, old: Tensor, alpha: float, projection: Projection, tol: float, exclude: Sequence[str]
) -> Tensor:
    if not is_projected(name, tau, exclude):
        return tau
    if tau.ndim == 2:
        return project(tau, old, alpha, projection, tol)
    projected = torch.empty_like(tau)
    for index in range(len(tau)):
        projected[index] = project(tau[index], old[index], alpha, projection, tol)
    return projected


def _floating(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in weights.items() if tensor.is_floating_point()}


def _plus(base: Weights, vector: Weights, scale: float) -> dict[str, Tensor]:
    return {name: base[name].double() + vector[name] * scale if name in vector else base[name].clone() for name in base}
