"""The few pieces of linear algebra that methods share. Norms and Gram matrices are float64; large operands stay float32
and are widened block by block."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 20  # elements widened to float64 at a time: 8 MiB


def energy(x: Tensor) -> float:
    """The squared Frobenius norm of `x` in float64: NaN or infinite exactly where some element is."""
    norm = float(torch.linalg.vector_norm(x, dtype=torch.float64))
    return norm * norm  # where `**` would raise, this is infinite


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of rows of a matrix that hold about BLOCK_NUMEL elements each."""
    rows = max(1, BLOCK_NUMEL // max(1, x.shape[1]))
    return (slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows))


def gram(d_MN: Tensor, t_MN: Tensor) -> Tensor:
    """D'T in float64, (n, n), for float32 (m, n) operands."""
    total_NN = torch.zeros(d_MN.shape[1], t_MN.shape[1], dtype=torch.float64, device=d_MN.device)
    for rows in row_blocks(d_MN):
        total_NN.addmm_(d_MN[rows].double().T, t_MN[rows].double())
    return total_NN


def right_singular(d_MN: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Right singular vectors V (n, k) and singular values s (k), descending, of D through its Gram matrix, in float64.

    Directions with s_i <= tol * s_0 are left out: they carry nothing, and rounding alone decides where they point.
    k is 0 where D is zero.
    """
    squares, vectors = torch.linalg.eigh(gram(d_MN, d_MN))
    s = squares.clamp_min(0).sqrt().flip(0)
    keep = s > tol * s[:1]
    return vectors.flip(1)[:, keep], s[keep]
