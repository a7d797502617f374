"""The few pieces of linear algebra that methods share. Norms and Gram matrices are float64; large operands keep their
dtype and are widened block by block."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

BLOCK_NUMEL = 1 << 19  # elements of a block of rows
WIDE_NUMEL = 1 << 18  # of one that is widened: 2 MiB as float64, which a core's cache holds
ENERGY_NUMEL = 1 << 16  # elements widened at a time for a norm: they stay in the cache
PIECE_NUMEL = 1 << 18  # of a flattened tensor that goes through many elementwise steps
CUDA_NUMEL = 1 << 24  # in each case on a device, which wants few large pieces: 128 MiB as float64
STRIPS = 4  # of a Gram matrix's columns: products of 5/8 of it give it whole
SMALL_ROTATION = 1e-3  # radians; its square is what one improvement leaves


def energy(x: Tensor) -> float:
    """The squared Frobenius norm of `x` in float64: NaN or infinite exactly where some element is."""
    flat = x.reshape(-1)
    parts = list(pieces(x, ENERGY_NUMEL))
    wide = torch.empty_like(flat[parts[0]] if parts else flat, dtype=torch.float64)  # reused: fresh memory costs more
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in parts:
        same = wide[: part.stop - part.start].copy_(flat[part])
        total += torch.dot(same, same)
    return float(total)


def widened(x: Tensor) -> Tensor:
    """In float32 at least: arithmetic in mixed dtypes is several times slower."""
    return x if x.dtype == torch.float64 else x.float()


def pieces(x: Tensor, numel: int = PIECE_NUMEL) -> Iterator[slice]:
    """Slices of the flattened tensor, so small that what is made of one stays in the cache; CUDA_NUMEL on a device."""
    numel = CUDA_NUMEL if x.is_cuda else numel
    return (slice(start, min(start + numel, x.numel())) for start in range(0, x.numel(), numel))


def row_blocks(x: Tensor, numel: int = BLOCK_NUMEL) -> Iterator[slice]:
    """Slices of rows of a matrix that hold about `numel` elements each, CUDA_NUMEL on a device."""
    rows = max(1, (CUDA_NUMEL if x.is_cuda else numel) // max(1, x.shape[1]))
    return (slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows))


def add_product(h_MN: Tensor, tau_MN: Tensor, g_NN: Tensor, weight: float = 1.0) -> Tensor:
    """Adds weight * tau G to H in place, float64; tau is widened block by block."""
    for rows in row_blocks(tau_MN):
        h_MN[rows].addmm_(tau_MN[rows].double(), g_NN, alpha=weight)
    return h_MN


def gram(d_MN: Tensor) -> Tensor:
    """D'D in float64, (n, n), for (m, n)."""
    return _mirrored(_lower_gram(d_MN))


def _lower_gram(d_MN: Tensor, sign: float = 1.0) -> Tensor:
    """The lower triangle of sign * D'D in float64, which is all that an eigensolver reads."""
    total_NN = torch.zeros(d_MN.shape[1], d_MN.shape[1], dtype=torch.float64, device=d_MN.device)
    for _, d_BN in _wide_blocks(d_MN):
        _add_gram(total_NN, d_BN, sign)
    return total_NN


def _wide_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows in float64, each in the place of the one before: fresh memory costs more than the widening."""
    buffer = _wide_buffer(x)
    for rows in row_blocks(x, WIDE_NUMEL):
        yield rows, buffer[: rows.stop - rows.start].copy_(x[rows])


def _wide_buffer(x: Tensor) -> Tensor:
    """Room for the largest of these blocks; a matrix without rows has none."""
    rows = max((rows.stop - rows.start for rows in row_blocks(x, WIDE_NUMEL)), default=0)
    return torch.empty(rows, x.shape[1], dtype=torch.float64, device=x.device)


def _add_gram(total_NN: Tensor, d_BN: Tensor, sign: float) -> None:
    """Adds sign * D'D to the lower triangle of `total`, strip by strip; what is above it is left unsaid."""
    n = len(total_NN)
    width = max(1, -(-n // STRIPS))
    for start in range(0, n, width):
        strip = slice(start, start + width)
        total_NN[start:, strip].addmm_(d_BN[:, start:].T, d_BN[:, strip], alpha=sign)


def _mirrored(lower_NN: Tensor) -> Tensor:
    return lower_NN.tril_().add_(lower_NN.tril(-1).T)


def thin_svd(d_MN: Tensor, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """(L (m, p), R (n, p), s (p)) with D = L diag(s) R', s descending, p = min(m, n).

    L and R have the dtype of D, s is float64. R diagonalises D'D and L = D R / s, so that no full-size decomposition
    is needed. Directions with s_i <= tol * s_0 are left out, their s and their columns are zero: they carry nothing,
    and rounding alone decides where they point. Where D is float64, R is improved once; where it is narrower, its own
    rounding outweighs what that mends.
    """
    if d_MN.shape[0] < d_MN.shape[1]:
        right_NP, left_MP, s_P = thin_svd(d_MN.T, tol)
        return left_MP, right_NP, s_P
    negative_NN = _lower_gram(d_MN, sign=-1.0)  # whose eigenvalues ascend as the singular values of D descend
    if not negative_NN.diagonal().any():
        return torch.zeros_like(d_MN), torch.zeros_like(negative_NN, dtype=d_MN.dtype), negative_NN.diagonal().clone()
    v_NP = torch.linalg.eigh(negative_NN).eigenvectors
    if d_MN.dtype == torch.float64:
        v_NP = _improved(d_MN, v_NP)
    left_MP = torch.empty_like(d_MN, memory_format=torch.contiguous_format)
    squares_P = torch.zeros_like(v_NP[0])
    buffer = _wide_buffer(d_MN)
    for rows, d_BN in _wide_blocks(d_MN):
        us_BP = torch.mm(d_BN, v_NP, out=buffer[: len(d_BN)])
        left_MP[rows] = us_BP
        squares_P += us_BP.square_().sum(0)
    s_P = squares_P.sqrt()
    carries_P = s_P > tol * s_P.max()
    left_MP *= torch.where(carries_P, 1 / s_P, 0.0).to(d_MN.dtype)
    right_NP = v_NP.mul_(carries_P).to(d_MN.dtype).contiguous()
    return left_MP, right_NP, s_P * carries_P


def _improved(d_MN: Tensor, v_NP: Tensor) -> Tensor:
    """V (I + E): one step of first-order perturbation theory, as in one-sided Jacobi methods.

    Squaring D loses what lies (s_i / s_0)^2 below, while D V keeps each direction at its own scale: H = (D V)'(D V) is
    almost diagonal, and E_ij = H_ij / (H_jj - H_ii) diagonalises it up to E^2. Where two values are too close together
    for that the choice of vectors is free, and they stay as they are.
    """
    h_PP = torch.zeros_like(v_NP)
    for rows in row_blocks(d_MN):
        _add_gram(h_PP, d_MN[rows] @ v_NP, 1.0)
    squares_P = _mirrored(h_PP).diagonal()
    e_PP = h_PP / (squares_P - squares_P[:, None])
    free = (e_PP.abs() < SMALL_ROTATION).logical_not()  # the diagonal's 0 / 0 among them
    return v_NP + v_NP @ e_PP.masked_fill_(free, 0.0)


def svd_bytes(shape: Sequence[int]) -> int:
    """What `thin_svd` takes at its peak, beside its argument and results, for a matrix (m, n) or each of (k, m, n)."""
    m, n = shape[-2:]
    return 8 * (8 * min(m, n) ** 2 + 6 * min(m * n, BLOCK_NUMEL))  # the eigensolver's squares; widened blocks of rows


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
