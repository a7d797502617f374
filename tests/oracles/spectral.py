"""The spectral rules once more, from their formulas: iso_c, tsv_m, wudi, confluence, ace and OPCM's isotropic read-out.

As in `tests.oracles.rules`: float64, every expert in memory, nothing of the package imported. Results are merged task
vectors; what to add them to is the caller's business.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from tests.oracles.rules import DEFAULT_EXCLUDE, Projection, Weights, norm, project, task_vector

Counting = Sequence[float] | None


def iso_c(
    base: Weights,
    experts: Sequence[Weights],
    counting: Counting = None,
    scale: float = 1.0,
    tol: float = 1e-6,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """Iso-C (arXiv 2502.04959): scale * mean(s) * U V' of the weighted sum of each matrix, else the weighted mean."""

    def matrix(taus: Tensor, weights: Tensor, _theta0: Tensor) -> Tensor:
        return scale * flat(torch.einsum("t,tmn->mn", weights, taus), tol)

    return _merged(base, experts, counting, exclude, matrix)


def wudi_adam(
    base: Weights,
    experts: Sequence[Weights],
    counting: Counting = None,
    steps: int = 300,
    lr: float = 1e-5,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """WUDI (arXiv 2503.08099) as the authors run it: torch's Adam on the loss over all task vectors, from their sum."""

    def matrix(taus: Tensor, weights: Tensor, _theta0: Tensor) -> Tensor:
        merged = torch.einsum("t,tmn->mn", weights, taus).requires_grad_()
        adam = torch.optim.Adam([merged], lr=lr)
        for _ in range(steps):
            adam.zero_grad()
            wudi_loss(merged, taus, weights).backward()
            adam.step()
        return merged.detach()

    return _merged(base, experts, counting, exclude, matrix)


def wudi_ridge(
    base: Weights,
    experts: Sequence[Weights],
    counting: Counting = None,
    ridge: float = 1e-2,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """The least of WUDI's loss + lam * norm(M - S)^2, as one least-squares problem with a block of rows per expert.

    lam is `ridge` times the mean over the n inputs of sum_i w_i (norm of tau_i's column)^2 / norm(tau_i)^2.
    """

    return _merged(base, experts, counting, exclude, lambda taus, weights, _: _least(taus, weights, ridge))


def _least(taus: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """`wudi_ridge` of one matrix."""
    total = torch.einsum("t,tmn->mn", weights, taus)
    lengths = taus.square().sum((1, 2))
    used = lengths > 0
    if not used.any():
        return total
    shares = (weights[used] / lengths[used]).sqrt()[:, None, None]
    n = taus.shape[2]
    lam = ridge * (shares * taus[used]).square().sum((0, 1)).mean()
    rows = torch.cat([(shares * taus[used]).reshape(-1, n), lam.sqrt() * torch.eye(n, dtype=torch.float64)])
    wanted = torch.cat(
        [(shares * (taus[used] @ taus[used].mT)).reshape(-1, taus.shape[1]), lam.sqrt() * total.T]
    )  # of rows @ M'
    solved: Tensor = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
    return solved


def confluence(
    base: Weights,
    experts: Sequence[Weights],
    counting: Counting = None,
    scale: float = 1.0,
    ridge: float = 0.1,
    knee: float = 0.1,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """What `wudi_ridge` has of a matrix and, turned back, of the transposed one: their mean, each weighted by the
    squared length of what the other one changes of the sum; the first alone beyond 8 outputs for each input. Its
    singular values evened out down to knee times the largest where it stands at 45 degrees to the sum, further down
    where it turned more; mixed with the sum's direction from where the experts' mean squared Schatten 4-norm, in units
    of the base's and times the squared sine, is a 64th, and nothing but that from twice as much on; as long as makes
    the experts' parts in it, one by one and added up, as long as the experts are, but neither longer than four times
    those parts at length one, nor than they are as orthogonal ones, nor, where that is more, than those made longer
    until they are a tenth of the base; and of the area that it has beyond that of a mean expert only as much as is
    not the sum's direction. The experts are those that changed the matrix.
    """

    def matrix(taus: Tensor, weights: Tensor, theta0: Tensor) -> Tensor:
        changed = taus.abs().amax((1, 2)) > 0
        taus, weights = taus[changed], weights[changed]
        total = (weights[:, None, None] * taus).sum(0)
        if not changed.any():
            return total
        both = inputs = _least(taus, weights, ridge)
        if taus.shape[1] <= 8 * taus.shape[2]:
            outputs = _least(taus.mT, weights, ridge).T
            a, b = (inputs - total).square().sum(), (outputs - total).square().sum()
            both = (b * inputs + a * outputs) / (a + b) if a + b > 0 else total
        cosine = float((both * total).sum() / both.norm() / total.norm())
        sine_squared = max(0.0, 1 - cosine**2)
        u, sigma, v = torch.linalg.svd(both, full_matrices=False)
        if sine_squared > 1e-9:  # else only float64's rounding
            edge = knee * cosine**2 / sine_squared * sigma[0]
            sigma = sigma / (sigma.square() + edge**2).sqrt()
        shape = u @ torch.diag(sigma) @ v
        shape /= shape.norm()
        if float((shape * total).sum()) <= 0:
            return torch.zeros_like(total)
        fourths = torch.linalg.svdvals(taus).pow(4).sum(1).sqrt()
        against = float(torch.linalg.svdvals(theta0).pow(4).sum().sqrt())
        together = float((weights * fourths).sum()) / against if against else float("inf")
        kept = 1.0
        if sine_squared > 1e-9:
            kept = min(max(2 - 64 * together / float(weights.sum()) * sine_squared, 0.0), 1.0)
        shape = kept * shape + (1 - kept) * total / total.norm()
        shape /= shape.norm()
        whole = float((weights * taus.square().sum((1, 2))).sum())
        heard = sum(float(weight * (shape * tau).sum()) for weight, tau in zip(weights, taus, strict=True))
        orthogonal = whole**0.5 * max(1.0, 0.1 / together**0.5)
        length, mean = min(whole / heard, orthogonal, 4 * heard), whole / float(weights.sum())
        if length**2 > mean:
            length = (kept * length**2 + (1 - kept) * mean) ** 0.5
        return scale * length * shape

    return _merged(base, experts, counting, exclude, matrix)


def wudi_loss(merged: Tensor, taus: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i norm((M - tau_i) tau_i')^2 / norm(tau_i)^2 over the tau_i (t, m, n) that are not zero."""
    lengths = taus.square().sum((1, 2))
    off = ((merged - taus) @ taus.mT).square().sum((1, 2))
    loss: Tensor = (weights * off / torch.where(lengths > 0, lengths, 1.0)).sum()
    return loss


def tsv_m(
    base: Weights,
    experts: Sequence[Weights],
    counting: Counting = None,
    scale: float = 1.0,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """TSV-M (arXiv 2412.00081): of each of T matrices the first floor(k / T) singular triplets, k = min(m, n), in one
    row, both sides replaced by the orthonormal factor of their own decomposition. Beyond k experts: the k largest of
    the leading triplets.
    """

    def matrix(taus: Tensor, weights: Tensor, _theta0: Tensor) -> Tensor:
        count, k = len(taus), min(taus.shape[1:])
        triplets = []
        for tau, weight in zip(taus, weights, strict=True):
            u, s, vh = torch.linalg.svd(tau, full_matrices=False)
            first = [i for i in range(max(1, k // count)) if s[i] > 1e-6 * s[0]]
            triplets += [(float(weight * s[i]), u[:, i], vh[i]) for i in first]
        if count > k:
            triplets = sorted(triplets, key=lambda one: -one[0])[:k]
        if not triplets:
            return torch.zeros_like(taus[0])
        left, right = (torch.stack([one[side] for one in triplets], 1) for side in (1, 2))
        sizes = torch.tensor([one[0] for one in triplets], dtype=torch.float64)
        return scale * (_orthonormal(left) * sizes) @ _orthonormal(right).T

    return _merged(base, experts, counting, exclude, matrix)


def _orthonormal(x: Tensor) -> Tensor:
    """U V' of X = U S V', the nearest matrix with orthonormal columns."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def ace(
    base: Weights,
    experts: Sequence[Weights],
    counting: Counting = None,
    eps: float = 1e-2,
    normalise: str = "auto",
    heterogeneity: float = 0.3,
    share: float = 0.3,
    scale: float = 1.0,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """ACE-Merging (arXiv 2603.02945), expert by expert as the authors run it, with a weight for each; matrices that say
    nothing of a layer, being zero or alike in all rows, are passed over there.
    """

    def matrix(taus: Tensor, weights: Tensor, _theta0: Tensor) -> Tensor:
        told = [(tau, float(w)) for tau, w in zip(taus, weights, strict=True) if (tau - tau.mean(0)).abs().max() > 0]
        if not told:
            return torch.zeros_like(taus[0])
        n = taus.shape[2]
        energies = torch.stack([tau.square().sum() for tau, _ in told])
        logs = (energies + 1e-12).log()
        spread = float(logs.var() / (logs.mean() ** 2 + 1e-12)) if len(told) > 1 else 0.0
        divided = {"auto": spread > heterogeneity, "always": True, "never": False}[normalise]
        moments, ridged, moved = [], [], []
        for tau, _ in told:
            rows = tau - tau.mean(0)
            moment = rows.T @ rows
            by = moment.trace() + 1e-12 if divided else 1.0
            moments.append(moment / by)
            ridged.append(moment / by + eps / by * torch.eye(n, dtype=torch.float64))
            moved.append(rows)
        pairs = list(zip(told, moments, ridged, moved, strict=True))
        summed = sum((w * r for (_, w), _, r, _ in pairs), torch.zeros(n, n, dtype=torch.float64))
        prior = sum((w * c for (_, w), c, _, _ in pairs), torch.zeros(n, n, dtype=torch.float64)).mean(0, keepdim=True)
        if divided:
            prior = prior / (
                sum(w * e for (_, w), e in zip(told, energies, strict=True)) / sum(w for _, w in told) + 1e-12
            )
        weighed = sum((w * rows @ r for (_, w), _, r, rows in pairs), torch.zeros_like(taus[0]))
        merged = torch.linalg.solve(summed + prior, weighed, left=False)  # the prior's row is added to every row
        k = int(share * min(taus.shape[1:]))
        if divided and k:
            mean = summed / sum(w for _, w in told)
            fused = merged + sum((w * tau @ (c - mean) for (tau, w), c, _, _ in pairs), torch.zeros_like(merged))
            u, s, vh = torch.linalg.svd(fused, full_matrices=False)
            kept = s[:k] > 1e-6 * s[0]
            merged = merged + (s[:k] * kept).mean() * (u[:, :k] * kept) @ vh[:k]
        return scale * merged

    return _merged(base, experts, counting, exclude, matrix)


def opcm_isotropic(
    base: Weights,
    experts: Sequence[Weights],
    alpha: float = 0.5,
    projection: Projection = "code",
    scale: float = 2.0,
    tol: float = 1e-6,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> dict[str, Tensor]:
    """OPCM's sum A, its matrices read out as scale * mean(s) * U V', the rest as A * mean norm(tau) / norm(A)."""
    tasks = [task_vector(base, expert) for expert in experts]
    total = {name: torch.zeros_like(tau) for name, tau in tasks[0].items()}
    for task in tasks:
        for name, tau in task.items():
            for old, new in zip(_parts(total[name]), _parts(tau), strict=True):
                old += project(new, old, alpha, projection, tol) if _is_matrix(name, tau, exclude) else new
    length = sum(norm(task) for task in tasks) / len(tasks) / norm(total)
    return {
        name: torch.stack([scale * flat(part, tol) for part in _parts(a)]).reshape(a.shape)
        if _is_matrix(name, a, exclude)
        else a * length
        for name, a in total.items()
    }


def flat(x: Tensor, tol: float) -> Tensor:
    """mean(s) * U V' of one matrix, the mean over all min(m, n) values, with none for directions up to tol * s_0."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > tol * s[0]
    merged: Tensor = (s * kept).mean() * ((u * kept) @ vh)
    return merged


def _merged(
    base: Weights,
    experts: Sequence[Weights],
    counting: Counting,
    exclude: Sequence[str],
    matrix: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Each matrix by `matrix` from its task vectors (t, m, n), the weights (t) and the base's; others by the mean."""
    weights = torch.tensor(counting or [1.0] * len(experts), dtype=torch.float64)
    tasks = [task_vector(base, expert) for expert in experts]
    merged = {}
    for name in tasks[0]:
        taus = torch.stack([task[name] for task in tasks])  # (t, ...)
        if not _is_matrix(name, taus[0], exclude):
            merged[name] = torch.tensordot(weights, taus, 1) / weights.sum()
        elif taus.ndim == 3:
            merged[name] = matrix(taus, weights, base[name].double())
        else:
            merged[name] = torch.stack(
                [matrix(taus[:, k], weights, base[name][k].double()) for k in range(taus.shape[1])]
            )
    return merged


def _is_matrix(name: str, x: Tensor, exclude: Sequence[str]) -> bool:
    named = any(fnmatchcase(name, glob) for glob in exclude)
    return x.ndim in (2, 3) and min(x.shape[-2:]) > 1 and not named


def _parts(x: Tensor) -> list[Tensor]:
    """The matrices of a stack; anything else as the one part that it is."""
    return list(x) if x.ndim == 3 else [x]
