"""OPCM: orthogonal projection-based continual merging.

The paper's recursion on rescaled weights is kept here as the UNSCALED sum A of the projected task vectors and two
scalars, which is the same in exact arithmetic and better in float32:

    A_t = A_{t-1} + P(tau_t; A_{t-1})          P depends on the singular subspaces of A only, so A's scale is irrelevant
    deployed = base + A_t * n_t / ||A_t||      n_t = mean of ||tau_i||, i <= t; lambda_t = ||A_t|| / n_t

The rule amplifies rounding: where singular values of A stand close, rounding turns their vectors by (rounding / gap),
the diagonal that is removed is another one, and so on, up to tenfold per arrival. Hence A is float64 where it is
projected, and V is improved once (`linalg.right_singular`): ten arrivals of low-rank experts in bfloat16 then end 1e-6
from the exact result, against 3e-2 with A in float32.

With A = U diag(s) V', the projection removes entries of M = U' tau V. Nothing of U is ever formed: U = A V diag(1/s),
so that all it takes is the Gram matrix A'A, its eigenvectors V, and C = A' tau (n x n, float64).
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt

import torch
from torch import Tensor

from projector.linalg import energy, gram, right_singular, row_blocks
from projector.method import Expert, Method, State, Sums, Totals, param
from projector.spec import TensorSpec

EXCLUDED = ("*embed*", "*wte*", "*wpe*", "shared.weight", "*relative_attention_bias*")


@dataclass(frozen=True)
class Opcm(Method):
    """Projects each task vector orthogonally to what is already merged, adds it, and scales the sum adaptively.

    Matrices are projected; embeddings, vectors and scalars are summed. The first expert is taken whole. Projection
    "code" is the authors' released code, which gave the paper's table; "paper" is the formula in its text.
    """

    name = "opcm"
    formula = "A += P(tau; A); base + A * mean(||tau||) / ||A||"
    paper = "Tang et al., Merging models on the fly without retraining, arXiv 2501.09522"

    alpha: float = param(0.5, "share of A's nuclear norm that spans the protected subspace", low=0, high=1)
    projection: str = param("code", "which entries of U' tau V are removed", choices=("code", "paper"))
    tol: float = param(1e-6, "singular values up to tol times the largest are left out", low=0, high=0.1)
    accumulator: str = param(
        "float64", "dtype of a projected A; float32 halves the state", choices=("float64", "float32")
    )
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices that are summed, not projected")

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        projected = self._projects(spec) and self.accumulator == "float64"
        return {"A": TensorSpec(spec.name, spec.shape, torch.float64 if projected else torch.float32)}

    def elementwise(self, spec: TensorSpec) -> bool:
        return not self._projects(spec)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Expert) -> tuple[State, Sums]:
        a = state["A"]
        if not self._projects(spec):
            merged = a + delta
        elif delta.ndim == 3:  # a stack of matrices, as mixtures of experts keep them
            merged = torch.empty_like(a)
            for i in range(len(a)):
                merged[i] = self._add_projected(a[i], delta[i])
        else:
            merged = self._add_projected(a, delta)
        return {"A": merged}, {"task_vector": energy(delta), "merged": energy(merged)}

    def tally(self, totals: Totals, sums: Sums) -> Totals:
        experts = totals.experts + 1
        before = totals.scalars.get("mean_norm", 0.0)
        mean_norm = before + (sqrt(sums["task_vector"]) - before) / experts
        return Totals(experts, {"mean_norm": mean_norm, "merged_norm": sqrt(sums["merged"])})

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        merged_norm = totals.scalars.get("merged_norm", 0.0)
        scale = totals.scalars["mean_norm"] / merged_norm if merged_norm else 0.0
        return torch.add(base, state["A"], alpha=scale)

    def figures(self, totals: Totals) -> dict[str, float]:
        mean_norm = totals.scalars.get("mean_norm", 0.0)
        lam = totals.scalars["merged_norm"] / mean_norm if mean_norm else 0.0
        return {**totals.scalars, "lambda": lam}

    def _projects(self, spec: TensorSpec) -> bool:
        return (
            len(spec.shape) in (2, 3)
            and min(spec.shape[-2:]) >= 2
            and not any(fnmatchcase(spec.name, glob) for glob in self.exclude)
        )

    def _add_projected(self, a: Tensor, tau: Tensor) -> Tensor:
        """A + P(tau; A) for one matrix, (m, n); m < n through the transpose."""
        if not a.any():  # the first expert that trained this matrix is taken whole
            return a + tau
        if a.shape[0] < a.shape[1]:
            return self._add_projected(a.T, tau.T).T
        v_NK, s_K = right_singular(a, self.tol)
        c_NN = gram(a, tau)
        keep_NN, remove_NN = self._projector(v_NK, s_K, c_NN)
        merged = torch.empty_like(a, memory_format=torch.contiguous_format)
        for rows in row_blocks(a):
            a_BN, tau_BN = a[rows].double(), tau[rows].double()
            kept_BN = tau_BN if keep_NN is None else tau_BN @ keep_NN
            merged[rows] = a_BN + kept_BN - a_BN @ remove_NN
        return merged

    def _projector(self, v_NK: Tensor, s_K: Tensor, c_NN: Tensor) -> tuple[Tensor | None, Tensor]:
        """(Q, W) with P(tau) = tau Q - A W; Q is None for the identity.

        M = U' tau V = diag(1/s) V' C V in the directions that are kept; an entry M_ij goes from tau as
        u_i M_ij v_j' = A v_i (V' C V)_ij / s_i^2 v_j'. The leading r directions go as a block ("code") or as whole rows
        and columns of M ("paper"), the others by their diagonal.
        """
        r = self._rank(s_K)
        v_NR, s_R, v_NT, s_T = v_NK[:, :r], s_K[:r], v_NK[:, r:], s_K[r:]
        diagonal_T = (v_NT * (c_NN @ v_NT)).sum(0) / s_T.square()
        tail_NN = (v_NT * diagonal_T) @ v_NT.T
        rows_RN = (v_NR.T @ c_NN) / s_R.square()[:, None]
        if self.projection == "code":
            return None, v_NR @ (rows_RN @ v_NR) @ v_NR.T + tail_NN
        q_NN = torch.eye(len(c_NN), dtype=torch.float64, device=c_NN.device) - v_NR @ v_NR.T
        return q_NN, v_NR @ rows_RN @ q_NN + tail_NN

    def _rank(self, s_K: Tensor) -> int:
        """How many directions lead, by their cumulative share of the nuclear norm.

        "code": as many as do not exceed alpha. "paper": the fewest that reach it.
        """
        share_K = s_K.cumsum(0) / s_K.sum()
        if self.projection == "code":
            return len(s_K) if self.alpha == 1 else int((share_K <= self.alpha).sum())
        return min(len(s_K), int((share_K < self.alpha).sum()) + 1) if self.alpha else 0
