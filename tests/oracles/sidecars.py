"""Fisher merging, RegMean and MaTS written once more from their formulas, to judge the streaming ones by.

As in `tests.oracles.rules`: float64, every expert in memory, nothing of the package imported. All work on the weights
themselves, not on task vectors. `sidecars` holds one dict for each expert: Fisher by tensor name, Gram by layer name.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from tests.oracles.rules import DEFAULT_EXCLUDE, Weights


def fisher(
    base: Weights,
    experts: Sequence[Weights],
    sidecars: Sequence[Weights],
    weights: Sequence[float],
    floor: float = 1e-6,
    normalise: bool = True,
) -> dict[str, Tensor]:
    """sum c_i F_i theta_i / sum c_i F_i, F_i floored and over its norm over the model."""
    floored = [{name: f.double().clamp(min=floor) for name, f in one.items()} for one in sidecars]
    flat = [torch.cat([f.flatten() for f in one.values()]) for one in floored]
    scale = [c / f.norm() if normalise else c for c, f in zip(weights, flat, strict=True)]
    merged = {}
    for name in base:
        theta = torch.stack([expert[name].double() for expert in experts])
        f = torch.stack([c * one[name] for c, one in zip(scale, floored, strict=True)])
        merged[name] = (f * theta).sum(0) / f.sum(0)
    return merged


def regmean(
    base: Weights,
    experts: Sequence[Weights],
    sidecars: Sequence[Weights],
    weights: Sequence[float],
    off_diagonal: float = 0.95,
    ridge: float = 1e-6,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """W' = (sum c_i G_i + r I)^-1 (sum c_i G_i W_i' + r W_0'), r = ridge * the mean diagonal element of sum c_i G_i."""
    merged = mean(base, experts, weights)
    for name in filter(lambda name: is_linear(name, base[name], exclude), base):
        n = base[name].shape[1]
        keep = off_diagonal + (1 - off_diagonal) * torch.eye(n).double()
        grams = [c * keep * one[layer(name)].double() for c, one in zip(weights, sidecars, strict=True)]
        total = sum(grams, torch.zeros(n, n).double())
        r = ridge * total.trace() / n
        right = r * base[name].double().T
        for g, expert in zip(grams, experts, strict=True):
            right = right + g @ expert[name].double().T
        merged[name] = torch.linalg.solve(total + r * torch.eye(n).double(), right).T
    return merged


def mats(
    base: Weights,
    experts: Sequence[Weights],
    sidecars: Sequence[Weights],
    weights: Sequence[float],
    curvature: str = "gram",
    iterations: int = 100,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """Conjugate gradients by what they are: the least A-norm error in x_0 + span(r, A r, ..., A^(k-1) r).

    A is sum c_i C_i as a full matrix over the flattened tensor, b is sum c_i C_i w_i, x_0 = W_0 + sum c_i tau_i.
    """
    merged = mean(base, experts, weights)
    for name, theta0 in base.items():
        solved = is_linear(name, theta0, exclude) if curvature == "gram" else not is_named(name, exclude)
        if not theta0.numel() or not solved:
            continue
        a, b, start = torch.zeros(()).double(), torch.zeros(()).double(), theta0.double().flatten()
        for c, expert, one in zip(weights, experts, sidecars, strict=True):
            theta = expert[name].double().flatten()
            if curvature == "gram":
                block = torch.kron(torch.eye(theta0.shape[0]).double(), one[layer(name)].double())
            else:
                block = one[name].double().flatten().diag()
            a = a + c * block
            b = b + c * block @ theta
            start = start + c * (theta - theta0.double().flatten())
        merged[name] = galerkin(a, b, start, iterations).reshape(theta0.shape)
    return merged


def galerkin(a: Tensor, b: Tensor, start: Tensor, steps: int) -> Tensor:
    """The least A-norm error in the Krylov space of `steps` dimensions, with an orthonormal basis of it in memory."""
    residual = b - a @ start
    basis: list[Tensor] = []
    new, size = residual, residual.norm()
    for _ in range(steps):
        before = new.norm()
        for _ in range(3):
            for old in basis:
                new = new - old * (old @ new)
        if new.norm() <= 1e-11 * max(before, size * 1e-3):  # the space is exhausted
            break
        basis.append(new / new.norm())
        new = a @ basis[-1]
    if not basis:
        return start
    k = torch.stack(basis, 1)  # (numel, steps)
    return start + k @ torch.linalg.solve(k.T @ a @ k, k.T @ residual)


def nearest_solution(
    factors: Sequence[Tensor], taus: Sequence[Tensor], weights: Sequence[float], start: Tensor
) -> Tensor:
    """The solution X of X (sum c_i F_i'F_i) = sum c_i tau_i F_i'F_i that is nearest to `start`: where there is none of
    the inputs F_i, it is `start`. By the pseudo-inverse of the stacked factors, which never squares them.
    """
    left = torch.cat([c**0.5 * f.double() for c, f in zip(weights, factors, strict=True)])
    right = torch.cat([c**0.5 * f.double() @ tau.double().T for c, f, tau in zip(weights, factors, taus, strict=True)])
    return start.double() + (torch.linalg.pinv(left) @ (right - left @ start.double().T)).T


def mean(base: Weights, experts: Sequence[Weights], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum c_i theta_i / sum c_i."""
    pairs = [*zip(weights, experts, strict=True)]
    return {
        name: sum((c * expert[name].double() for c, expert in pairs), torch.zeros(()).double()) / sum(weights)
        for name in base
    }


def is_linear(name: str, tensor: Tensor, exclude: Sequence[str]) -> bool:
    """Whether a tensor is regressed: a matrix with both sides >= 2 and no excluded name."""
    return tensor.ndim == 2 and min(tensor.shape) >= 2 and not is_named(name, exclude)


def is_named(name: str, globs: Sequence[str]) -> bool:
    """Whether a name matches one of the globs."""
    return any(fnmatchcase(name, glob) for glob in globs)


def layer(name: str) -> str:
    """The layer that a weight belongs to, which is what a Gram matrix is named after."""
    return name.removesuffix(".weight")
