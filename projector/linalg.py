"""The few pieces of linear algebra that methods share. Norms and Gram matrices are float64; large operands stay float32
and are widened block by block."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 20  # elements widened to float64 at a time: 8 MiB
SMALL_ROTATION = 1e-3  # radians; its square is what one improvement leaves


def energy(x: Tensor) -> float:
    """The squared Frobenius norm of `x` in float64: NaN or infinite exactly where some element is."""
    total = 0.0
    for piece in torch.split(x.reshape(-1), BLOCK_NUMEL):  # vector_norm widens all that it is given at once
        norm = float(torch.linalg.vector_norm(piece, dtype=torch.float64))
        total += norm * norm  # where `**` would raise, this is infinite
    return total


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Slices of rows of a matrix that hold about BLOCK_NUMEL elements each."""
    rows = max(1, BLOCK_NUMEL // max(1, x.shape[1]))
    return (slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows))


def gram(d_MN: Tensor, t_MN: Tensor) -> Tensor:
    """D'T in float64, (n, n), for (m, n) operands."""
    total_NN = torch.zeros(d_MN.shape[1], t_MN.shape[1], dtype=torch.float64, device=d_MN.device)
    for rows in row_blocks(d_MN):
        total_NN.addmm_(d_MN[rows].double().T, t_MN[rows].double())
    return total_NN


def right_singular(d_MN: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Right singular vectors V (n, k) and singular values s (k), descending, of D, in float64, without U.

    They are the eigenvectors of D'D, improved once: squaring loses what lies (s_i / s_0)^2 below, while D V keeps each
    direction at its own scale. Directions with s_i <= tol * s_0 are left out: they carry nothing, and rounding alone
    decides where they point. k is 0 where D is zero.
    """
    v_NN = torch.linalg.eigh(gram(d_MN, d_MN)).eigenvectors.flip(1)
    v_NN, s_N = _improved(d_MN, v_NN)
    keep_N = s_N > tol * s_N[:1]
    return v_NN[:, keep_N], s_N[keep_N]


def _improved(d_MN: Tensor, v_NN: Tensor) -> tuple[Tensor, Tensor]:
    """(V (I + E), singular values): one step of first-order perturbation theory, as in one-sided Jacobi methods.

    H = (D V)'(D V) is almost diagonal, and E_ij = H_ij / (H_jj - H_ii) diagonalises it up to E^2. Where two values are
    too close together for that the choice of vectors is free, and they stay as they are.
    """
    h_NN = torch.zeros_like(v_NN)
    for rows in row_blocks(d_MN):
        u_BN = d_MN[rows].double() @ v_NN
        h_NN.addmm_(u_BN.T, u_BN)
    squares_N = h_NN.diagonal().clone()
    e_NN = h_NN / (squares_N - squares_N[:, None])
    free = (e_NN.abs() < SMALL_ROTATION).logical_not()  # the diagonal's 0 / 0 among them
    return v_NN + v_NN @ e_NN.masked_fill_(free, 0.0), squares_N.sqrt()
