"""TSV-M: the leading singular triplets of every task matrix, made orthogonal to each other, side by side.

Offline, each of T task matrices tau_i = U_i diag(s_i) V_i' keeps its first d = floor(k / T) triplets, k = min(m, n).
What the next expert leaves of them, floor(k / (T + 1)), is a prefix of that: cutting what is kept and appending the
newcomer's own gives what the offline method has, and there are never more than k triplets, however many experts came.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from projector.algebra.linalg import BLOCK_NUMEL, EXCLUDED, lower_gram, matrices, row_blocks, wide_blocks
from projector.algebra.svd import svd_bytes, thin_svd
from projector.method import Contribution, State, param
from projector.methods._solving import Solving
from projector.spec import TensorSpec

# Of the largest eigenvalue of L'L. Below, experts have the direction in common as far as float32 can tell.
SHARED = 1e-11
TOL = 1e-6  # of s_0: below, a triplet of a task matrix is rounding


@dataclass(frozen=True)
class TsvM(Solving):
    """Sums the experts' leading singular triplets once their directions are made orthogonal.

    With L (m, c), R (n, c) and s (c) all triplets that are kept, the merged task vector of a matrix is

        scale * polar(L) diag(s) polar(R)'          polar(X) = X (X'X)^(-1/2), the nearest orthonormal columns

    An expert's s count times its weight. Beyond k experts no whole triplet is due to each: the k that are largest of
    their leading ones are kept, for which the paper has no rule. Embeddings, vectors and scalars are averaged.

    The triplets lie in the order of their singular values, so that the experts' order shows in nothing.

    >>> from projector.method import Totals
    >>> spec, tsv = TensorSpec("w", (2, 2), torch.float32), TsvM()
    >>> state = {key: torch.zeros(slot.shape) for key, slot in tsv.slots(spec).items()}
    >>> for t, delta in enumerate([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]]], start=1):
    ...     state, _ = tsv.update(state, torch.tensor(delta), spec, Contribution(t))
    >>> tsv.read(torch.zeros(2, 2), state, Totals(2), spec).abs()
    tensor([[3., 0.],
            [0., 2.]])
    """

    name = "tsv_m"
    formula = "base + scale * polar(L) diag(s) polar(R)' of each expert's first floor(k / T) triplets; else: mean"
    paper = "Gargiulo et al., Task singular vectors, arXiv 2412.00081"
    order_independent = True
    weighted = True

    scale: float = param(1.0, "factor of merged matrices", low=0, high=10)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to average")

    @property
    def grows(self) -> bool:
        return True

    def own_slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """L, R, s, and each triplet's place within its expert, from 0; what is not used of them is zero."""
        *stack, m, n = spec.shape
        k = min(m, n)
        shapes = {"L": (*stack, m, k), "R": (*stack, n, k), "s": (*stack, 1, k), "place": (*stack, 1, k)}
        return {key: TensorSpec(spec.name, shape, torch.float32) for key, shape in shapes.items()}

    def room(self, spec: TensorSpec) -> int:
        m, n = spec.shape[-2:]
        k = min(m, n)
        # The newcomer's triplets and the first of them, all that are there beside each other, those in their order.
        update = svd_bytes(spec.shape) + 4 * 4 * k * (m + n)
        read = 8 * (6 * k * k + 3 * min(m * n, BLOCK_NUMEL)) + 4 * k * (m + n)  # eigh; widened blocks; both factors
        return max(update, read)

    def fold(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        new = {key: torch.zeros_like(state[key]) for key in ("L", "R", "s", "place")}
        operands = [state[key] for key in new] + list(new.values())
        for d_MN, *parts in matrices(delta, *operands):
            due = min(d_MN.shape) // expert.index or 1
            kept, own = Triplets(*parts[:4]), Triplets.of(d_MN, expert.weight)
            kept.first(due).beside(own.first(due)).into(*parts[4:])
        return new

    def solve(self, base: Tensor, state: State, spec: TensorSpec) -> Tensor:
        merged = base.clone()
        for merged_MN, left_MK, right_NK, s_1K in matrices(merged, state["L"], state["R"], state["s"]):
            used = int(s_1K.count_nonzero())
            left_MC, right_NC = polar(left_MK[:, :used]), polar(right_NK[:, :used])
            left_MC *= self.scale * s_1K[:, :used]
            for rows in row_blocks(merged_MN):
                merged_MN[rows] += left_MC[rows] @ right_NC.T
        return merged


@dataclass(frozen=True)
class Triplets:
    """Singular triplets of several experts: left (m, c), right (n, c), s (1, c), and each one's place in its expert."""

    left_MC: Tensor
    right_NC: Tensor
    s_1C: Tensor
    place_1C: Tensor

    @classmethod
    def of(cls, d_MN: Tensor, weight: float) -> Self:
        """Those of one task matrix, with its weight."""
        left_MP, right_NP, s_P = thin_svd(d_MN, TOL)
        s_1P = (weight * s_P).float()[None]
        return cls(left_MP, right_NP, s_1P, torch.arange(len(s_P), dtype=torch.float32, device=d_MN.device)[None])

    def first(self, d: int) -> Self:
        """The first d of each expert; none is empty."""
        return self._chosen(((self.s_1C[0] > 0) & (self.place_1C[0] < d)).nonzero()[:, 0])

    def beside(self, other: Self) -> Self:
        """Both, the largest first."""
        parts = zip(self._parts(), other._parts(), strict=True)
        both = type(self)(*(torch.cat(pair, 1) for pair in parts))
        return both._chosen(torch.sort(both.s_1C[0], descending=True, stable=True).indices)

    def into(self, left_MK: Tensor, right_NK: Tensor, s_1K: Tensor, place_1K: Tensor) -> None:
        """Writes the first k of these into tensors of zeros."""
        for target, part in zip((left_MK, right_NK, s_1K, place_1K), self._parts(), strict=True):
            width = min(target.shape[1], part.shape[1])
            target[:, :width] = part[:, :width]

    def _chosen(self, columns: Tensor) -> Self:
        return type(self)(*(part[:, columns] for part in self._parts()))

    def _parts(self) -> Sequence[Tensor]:
        return self.left_MC, self.right_NC, self.s_1C, self.place_1C


def polar(x_MC: Tensor) -> Tensor:
    """X (X'X)^(-1/2), float32: the matrix with orthonormal columns that is nearest to X (m, c), m >= c.

    A direction that several columns share up to rounding has no column of its own, and is left out.
    """
    values_C, vectors_CC = torch.linalg.eigh(lower_gram(x_MC))
    carries_C = values_C > SHARED * values_C[-1:]
    root_CC = vectors_CC * torch.where(carries_C, values_C.abs().rsqrt(), 0.0) @ vectors_CC.T
    found_MC = torch.empty_like(x_MC, memory_format=torch.contiguous_format)
    for rows, x_BC in wide_blocks(x_MC):  # in float64: the root's elements are large where directions nearly meet
        found_MC[rows] = x_BC @ root_CC
    return found_MC
