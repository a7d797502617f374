"""Singular value decompositions from the smaller Gram matrix, or from a sketch where the rank is low.

The sketch is Halko, Martinsson and Tropp's ("Finding structure with randomness", arXiv 0909.4061, algorithm 4.1), with
what it leaves out measured instead of estimated.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from projector.algebra.linalg import (
    BLOCK_NUMEL,
    add_gram,
    eigenvectors,
    lower_gram,
    mirrored,
    row_blocks,
    wide_blocks,
    wide_buffer,
)

SMALL_ROTATION = 1e-3  # radians; its square is what one improvement leaves
LOW_RANK = 1 / 8  # of the shorter side: above, a sketch saves little
OVERSAMPLING = 8  # columns of a sketch beyond the rank that is expected
LEFT_OUT = 1e-6  # of the largest singular value, at the most, whatever the tolerance: it turns the directions kept
ROUNDING = 4  # of a dtype's eps: what the rounding of many sums comes to
POWERS = 3

Svd = tuple[Tensor, Tensor, Tensor]


def thin_svd(d_MN: Tensor, tol: float) -> Svd:
    """(L (m, p), R (n, p), s (p)) with D = L diag(s) R', s descending, p = min(m, n).

    L and R have the dtype of D, s is float64. R diagonalises D'D and L = D R / s, so that no full-size decomposition
    is needed. Directions with s_i <= tol * s_0 are left out, their s and their columns are zero: they carry nothing,
    and rounding alone decides where they point. Where D is float64, R is improved once; where it is narrower, its own
    rounding outweighs what that mends.

    A D of low rank, as adapters make it, is decomposed within its range, which costs m n rank instead of m n n.
    """
    if d_MN.shape[0] < d_MN.shape[1]:
        right_NP, left_MP, s_P = thin_svd(d_MN.T, tol)
        return left_MP, right_NP, s_P
    if found := _low_rank_svd(d_MN, tol):
        return found
    negative_NN = lower_gram(d_MN, sign=-1.0)  # whose eigenvalues ascend as the singular values of D descend
    if not negative_NN.diagonal().any():
        return torch.zeros_like(d_MN), torch.zeros_like(negative_NN, dtype=d_MN.dtype), negative_NN.diagonal().clone()
    v_NP = eigenvectors(negative_NN)
    if d_MN.dtype == torch.float64:
        v_NP = _improved(d_MN, v_NP)
    left_MP = torch.empty_like(d_MN, memory_format=torch.contiguous_format)
    squares_P = torch.zeros_like(v_NP[0])
    buffer = wide_buffer(d_MN)
    for rows, d_BN in wide_blocks(d_MN):
        us_BP = torch.mm(d_BN, v_NP, out=buffer[: len(d_BN)])
        left_MP[rows] = us_BP
        squares_P += us_BP.square_().sum(0)
    s_P = squares_P.sqrt()
    carries_P = s_P > tol * s_P.max()
    left_MP *= torch.where(carries_P, 1 / s_P, 0.0).to(d_MN.dtype)
    right_NP = v_NP.mul_(carries_P).to(d_MN.dtype).contiguous()
    s_P *= carries_P
    if not carries_P[: int(carries_P.sum())].all():  # close to the tolerance the order is rounding's
        order_P = torch.sort(carries_P, descending=True, stable=True).indices
        return left_MP[:, order_P], right_NP[:, order_P], s_P[order_P]
    return left_MP, right_NP, s_P


def _low_rank_svd(d_MN: Tensor, tol: float) -> Svd | None:
    """`thin_svd` by way of D's range, for m >= n; None where what that leaves out is not below tol * s_0.

    Mostly a small piece of D says at once that the rank is not low.
    """
    m, n = d_MN.shape
    most = int(LOW_RANK * n)
    width = OVERSAMPLING + _rank(d_MN[:: m // most or 1, :: n // most or 1][:most, :most]) if most else n
    if width > most:
        return None
    generator = torch.Generator().manual_seed(0)
    omega_NK = torch.randn(n, width, generator=generator, dtype=torch.float64).to(d_MN.device)
    q_MK = torch.linalg.qr(torch.cat([d_BN @ omega_NK for _, d_BN in wide_blocks(d_MN)])).Q
    within_KN = torch.zeros(width, n, dtype=torch.float64, device=d_MN.device)
    for rows, d_BN in wide_blocks(d_MN):
        within_KN.addmm_(q_MK[rows].T, d_BN)
    left_KK, right_NK, s_K = thin_svd(within_KN, tol)
    if _outside(d_MN, q_MK, within_KN) > min(tol, LEFT_OUT) * s_K[0]:
        return None
    left_MP, right_NP = d_MN.new_zeros(m, n), d_MN.new_zeros(n, n)
    left_MP[:, :width] = q_MK @ left_KK
    right_NP[:, :width] = right_NK
    return left_MP, right_NP, torch.cat([s_K, s_K.new_zeros(n - width)])


def _outside(d_MN: Tensor, q_MK: Tensor, within_KN: Tensor) -> float:
    """The spectral norm of D - Q W, by a few steps of the power method on a block of vectors: within a few per cent
    where one direction was left out, and of a rounding's many equal ones about a half."""
    x_NJ = torch.randn(d_MN.shape[1], OVERSAMPLING, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_NJ, norm = x_NJ.to(d_MN.device), 0.0
    for _ in range(POWERS):
        x_NJ = torch.linalg.qr(x_NJ).Q
        seen_KJ, back_NJ, squares_J = within_KN @ x_NJ, torch.zeros_like(x_NJ), torch.zeros_like(x_NJ[0])
        for rows, d_BN in wide_blocks(d_MN):
            y_BJ = d_BN @ x_NJ - q_MK[rows] @ seen_KJ
            back_NJ += d_BN.T @ y_BJ - within_KN.T @ (q_MK[rows].T @ y_BJ)
            squares_J += y_BJ.square().sum(0)
        x_NJ, norm = back_NJ, float(squares_J.max().sqrt())
    return norm


def _rank(piece: Tensor) -> int:
    """How many singular values of a small matrix stand above what rounding adds up to in its dtype; asked of the CPU,
    whatever the device, so that each takes the same way."""
    values = torch.linalg.svdvals(piece.double().cpu())
    return int((values > ROUNDING * torch.finfo(piece.dtype).eps * values[0]).sum())


def _improved(d_MN: Tensor, v_NP: Tensor) -> Tensor:
    """V (I + E): one step of first-order perturbation theory, as in one-sided Jacobi methods.

    Squaring D loses what lies (s_i / s_0)^2 below, while D V keeps each direction at its own scale: H = (D V)'(D V) is
    almost diagonal, and E_ij = H_ij / (H_jj - H_ii) diagonalises it up to E^2. Where two values are too close together
    for that the choice of vectors is free, and they stay as they are.
    """
    h_PP = torch.zeros_like(v_NP)
    for rows in row_blocks(d_MN):
        add_gram(h_PP, d_MN[rows] @ v_NP, 1.0)
    squares_P = mirrored(h_PP).diagonal()
    e_PP = h_PP / (squares_P - squares_P[:, None])
    free = (e_PP.abs() < SMALL_ROTATION).logical_not()  # the diagonal's 0 / 0 among them
    return v_NP + v_NP @ e_PP.masked_fill_(free, 0.0)


def svd_bytes(shape: Sequence[int]) -> int:
    """What `thin_svd` takes at its peak, beside its argument and results, for a matrix (m, n) or each of (k, m, n)."""
    m, n = shape[-2:]
    squares, sketches = 8 * min(m, n) ** 2, int(3 * LOW_RANK * m * n)  # the eigensolver's; the sketch, Q, a copy
    return 8 * (max(squares, sketches) + 6 * min(m * n, BLOCK_NUMEL))  # and widened blocks of rows


def isotropic(d: Tensor, tol: float) -> Tensor:
    """mean(s) U V' of D = U diag(s) V', (m, n), of the dtype of D; a stack of matrices (k, m, n) is taken one by one.

    These are the singular vectors of D, and all its singular values are made their mean over min(m, n). Directions with
    s_i <= tol * s_0 are left out of U V', and count as zero in the mean.
    """
    if d.ndim == 3:
        return torch.stack([isotropic(d_MN, tol) for d_MN in d])
    left_MP, right_NP, s_P = thin_svd(d, tol)
    return left_MP.mul_(s_P.mean()) @ right_NP.T


def isotropic_bytes(shape: Sequence[int], itemsize: int) -> int:
    """What `isotropic` takes at its peak, beside its argument and result."""
    m, n = shape[-2:]
    return svd_bytes(shape) + itemsize * (min(m, n) * (m + n) + prod(shape))
