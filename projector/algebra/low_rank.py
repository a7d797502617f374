"""The best approximation of a matrix by one of low rank (Eckart and Young, 1936), from the smaller Gram matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import eigenvectors, gram, row_blocks
from projector.algebra.svd import svd_bytes

NEGLIGIBLE = 1e-7  # of the largest singular value: float32 factors do not carry what is below


@dataclass(frozen=True)
class LowRank:
    """D = up @ down, up to what the rank leaves out.

    up: (m, r) and down: (r, n), float32; each holds the square root of every singular value, so that both have the
    same norm. kept, total: the squared norms of up @ down and of D, in float64.
    """

    up: Tensor
    down: Tensor
    kept: float
    total: float

    @property
    def rank(self) -> int:
        """r: never more than was asked for, than the smaller side, or than D has; 0 where D is zero."""
        return len(self.down)


def low_rank(d_MN: Tensor, rank: int) -> LowRank:
    """The matrix of rank `rank` or less that is nearest to D (m, n), as two factors.

    The rows of R are the leading eigenvectors of D'D (of DD' where m < n), in float64, and up = D R' / sqrt(s), so that
    up @ down is D projected onto them, however close together the singular values are. Those <= NEGLIGIBLE times the
    largest are left out. Each row of `down`, or each column of `up` where m < n, has its largest element positive: the
    same D gives the same factors.
    """
    if d_MN.shape[0] < d_MN.shape[1]:
        found = low_rank(d_MN.T, rank)
        return LowRank(found.down.T.contiguous(), found.up.T.contiguous(), found.kept, found.total)
    g_NN = gram(d_MN)
    total = float(g_NN.trace())
    if not total:
        return LowRank(d_MN.new_zeros(len(d_MN), 0).float(), d_MN.new_zeros(0, len(g_NN)).float(), 0.0, 0.0)
    r_NR = eigenvectors(g_NN)[:, -rank:].flip(1)  # eigenvalues ascend
    del g_NN
    r_NR = r_NR * _signs(r_NR)
    us_MR = torch.empty(len(d_MN), r_NR.shape[1], dtype=torch.float64, device=d_MN.device)
    for rows in row_blocks(d_MN):
        torch.mm(d_MN[rows].double(), r_NR, out=us_MR[rows])
    squares_R = us_MR.square().sum(0)
    carries_R = squares_R > NEGLIGIBLE**2 * squares_R.max()
    root_R = squares_R[carries_R].pow(0.25)
    up_MR = (us_MR[:, carries_R] / root_R).float()
    down_RN = (r_NR[:, carries_R] * root_R).T.contiguous().float()
    return LowRank(up_MR, down_RN, min(total, float(squares_R[carries_R].sum())), total)


def low_rank_bytes(shape: Sequence[int], rank: int) -> int:
    """What `low_rank` takes at its peak, its results included and D not, for a matrix (m, n)."""
    m, n = shape
    r = min(rank, m, n)
    return svd_bytes(shape) + 8 * 3 * r * max(m, n)


def _signs(r_NR: Tensor) -> Tensor:
    """+1 or -1 for each column, which makes its first largest element positive."""
    largest_1R = r_NR.abs().argmax(0, keepdim=True)
    return torch.where(r_NR.gather(0, largest_1R) < 0, -1.0, 1.0).to(r_NR.dtype)
