"""ZipIt! (Stoica et al., arXiv 2305.03053) from the paper's text, in float64, with every matrix written out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def correlations(features: Array) -> Array:
    """Of features (rows, 2n), all rows in memory; 0 for a feature that is constant."""
    off = features - features.mean(axis=0)
    spread = np.sqrt((off**2).sum(axis=0))
    return np.array(
        [
            [
                0.0 if not spread[i] * spread[j] else off[:, i] @ off[:, j] / (spread[i] * spread[j])
                for j in range(len(spread))
            ]
            for i in range(len(spread))
        ]
    )


def matched(correlation: Array, weights: Sequence[float], alpha: float, beta: float) -> tuple[Array, Array]:
    """(M (n, 2n), U (2n, n)): section 4's greedy matching, with lists of features that shrink by one each step."""
    n = len(correlation) // 2
    found = [[f] for f in range(2 * n)]
    owner = [f // n for f in range(2 * n)]
    like = {(i, j): correlation[i, j] for i in range(2 * n) for j in range(2 * n) if i != j}
    left = [int(beta * (n // 2) + 1e-9)] * 2
    alive = list(range(2 * n))
    done: set[int] = set()

    def close(model: int) -> None:
        """Its budget is used up: what is its own now never comes together, whatever it becomes part of."""
        for i in alive:
            for j in alive:
                if i != j and owner[i] == owner[j] == model:
                    like[i, j] = -np.inf

    for model in range(2):
        if left[model] == 0:
            close(model)
    while len(alive) > n:
        best: tuple[float, int, int] | None = None
        for i in alive:
            for j in alive:
                if i >= j or (alpha == 0 and (i in done or j in done)):
                    continue
                if best is None or like[i, j] > best[0]:
                    best = like[i, j], i, j
        assert best is not None
        _, i, j = best
        found[i] += found[j]
        alive.remove(j)
        done.add(i)
        for k in alive:
            if k != i:
                lower = min(like[i, k], like[j, k])
                like[i, k] = like[k, i] = alpha * lower if alpha else lower
        if owner[i] == owner[j]:
            left[owner[i]] -= 1
            if left[owner[i]] == 0:
                close(owner[i])
    merge, unmerge = np.zeros((n, 2 * n)), np.zeros((2 * n, n))
    for row, i in enumerate(alive):
        total = sum(weights[f // n] for f in found[i])
        for f in found[i]:
            merge[row, f] = weights[f // n] / total
            unmerge[f, row] = 1
    return merge, unmerge


def blocks(one: Array, other: Array) -> Array:
    """Both models' weights as those of one network of twice the width."""
    return np.block(
        [[one, np.zeros((one.shape[0], other.shape[1]))], [np.zeros((other.shape[0], one.shape[1])), other]]
    )


def zipped_mlp(
    models: Sequence[dict[str, Array]], x: Array, weights: Sequence[float], alpha: float, beta: float
) -> dict[str, Array]:
    """Layers "0", "2", "4" with ReLU between: the rule W* = M (W_A, W_B) U of each layer in turn."""
    names = ("0", "2", "4")
    unmerge = np.vstack([np.eye(x.shape[1])] * 2)  # both read the same inputs
    at = [x, x]
    found = {}
    for name in names:
        at = [one @ model[f"{name}.weight"].T + model[f"{name}.bias"] for one, model in zip(at, models, strict=True)]
        bias = np.concatenate([model[f"{name}.bias"] for model in models])
        if name == names[-1]:
            mean = np.hstack([weight * np.eye(at[0].shape[1]) for weight in weights])
            merge, after = mean, mean.T
        else:
            at = [np.maximum(one, 0) for one in at]
            merge, after = matched(correlations(np.hstack(at)), weights, alpha, beta)
        found[f"{name}.weight"] = merge @ blocks(*(model[f"{name}.weight"] for model in models)) @ unmerge
        found[f"{name}.bias"] = merge @ bias
        unmerge = after
    return found


def zipped_residual(models: Sequence[dict[str, Array]], x: Array, weights: Sequence[float]) -> dict[str, Array]:
    """s = enter x; s += down ReLU(up s); out = leave s: what enters the stream and what is added to it share an M."""
    streams, hidden = [], []
    for model in models:
        stream = x @ model["enter.weight"].T
        inside = np.maximum(stream @ model["up.weight"].T, 0)
        hidden.append(inside)
        streams.append(stream + inside @ model["down.weight"].T)
    (ms, us), (mh, uh) = (matched(correlations(np.hstack(f)), weights, 0, 1) for f in (streams, hidden))
    mean = np.hstack([weight * np.eye(len(models[0]["leave.weight"])) for weight in weights])
    both = {name: blocks(models[0][name], models[1][name]) for name in models[0]}
    return {
        "enter.weight": ms @ both["enter.weight"] @ np.vstack([np.eye(x.shape[1])] * 2),
        "up.weight": mh @ both["up.weight"] @ us,
        "down.weight": ms @ both["down.weight"] @ uh,
        "leave.weight": mean @ both["leave.weight"] @ us,
    }
