"""OPCM: orthogonal projection-based continual merging.

The paper's recursion on rescaled weights is kept here as the UNSCALED sum A of the projected task vectors and two
scalars, which is the same in exact arithmetic and better in float32:

    A_t = A_{t-1} + P(tau_t; A_{t-1})          P depends on the singular subspaces of A only, so A's scale is irrelevant
    deployed = base + A_t * n_t / ||A_t||      n_t = mean of ||tau_i||, i <= t; lambda_t = ||A_t|| / n_t

With A = L diag(s) R', the projection removes entries of M = L' tau R. The basis (L, R, s) depends on A alone, so it is
prepared while nothing arrives; an arrival is then two products of tau's size: tau R, and what is removed times R'.

An adapter brings tau = up down, of rank k, and M is (up' L)' (down R): the first product costs k (m + n) instead of
m n for each direction. While nothing but adapters was merged A has few directions too, at most the sum of their ranks;
then the basis costs little, and the second product runs over those directions alone.

The rule amplifies rounding: where singular values of A stand close, rounding turns their vectors by (rounding / gap),
the diagonal that is removed is another one, and so on, up to tenfold per arrival. Where base and experts are of half
precision, task vectors rest on a floor of close singular values, and are exact in float32; A is then float64: ten
arrivals of low-rank experts end 1e-6 from the exact result, against 3e-2 with A in float32. Task vectors of a float32
base are rounded themselves, which alone may turn the result by 1e-2 in ten arrivals of wide matrices; with projection
"code" A is float32 then, and ends as far from the exact result over the same files. The isotropic read-out lets A's
weakest directions weigh as much as the strongest, and its rounding with them: A is float64 for it.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from projector.algebra.linalg import EXCLUDED, energy, is_projected, matrices, row_blocks
from projector.algebra.svd import isotropic, isotropic_bytes, svd_bytes, thin_svd
from projector.errors import BadParameter
from projector.method import Contribution, Factors, Method, State, Sums, Totals, param
from projector.spec import TensorSpec

LEAST_ISOTROPIC_TOL = 1e-6


@dataclass(frozen=True)
class Opcm(Method):
    """Projects each task vector orthogonally to what is merged, adds it, and scales the sum.

    Matrices are projected; embeddings, vectors and scalars are summed. The first expert is taken whole. Projection
    "code" is the authors' released code, which gave the paper's table; "paper" is the formula in its text. "lead" is
    ours, and experimental: the same block of leading directions as "code", but beyond it only what lies along A's own
    tail, A less its leading part, so that P(tau) is orthogonal to A all the same, and no other direction is needed:

        P(tau) = tau - L_r M_rr R_r' - c A_tail         c = <tau, A_tail> / ||A_tail||^2

    The read-out "isotropic" makes all singular values of a projected matrix of A equal, as iso_c does with the plain
    sum (Marczak et al., arXiv 2502.04959): base + scale * mean(s) * U V', the mean over all min(m, n) values. It takes
    a tol of 1e-6 or more: where directions below that point rounding alone decides, and it would raise them too. With a
    tol of 0 it also decides what is projected away along them, once A is of low rank, as adapters leave it.
    """

    name = "opcm"
    formula = "A += P(tau; A); base + A * mean(||tau||) / ||A||, or isotropic base + scale * mean(s) * U V' of A"
    paper = "Tang et al., OPCM, arXiv 2501.09522"

    alpha: float = param(0.5, "share of A's nuclear norm that is protected", low=0, high=1)
    projection: str = param("code", "which entries of U' tau V are removed", choices=("code", "paper", "lead"))
    tol: float = param(1e-6, "singular values up to tol times the largest are left out", low=0, high=0.1)
    accumulator: str = param(
        "auto",
        "dtype of a projected A; auto: float32 for a float32 base, code and norm, else float64",
        choices=("auto", "float64", "float32"),
    )
    readout: str = param("norm", "A as it is, or its matrices with a flat spectrum", choices=("norm", "isotropic"))
    scale: float = param(2.0, "factor of isotropic matrices", low=0, high=10)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to sum")

    @property
    def grows(self) -> bool:
        return self.readout == "isotropic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.readout == "isotropic" and self.tol < LEAST_ISOTROPIC_TOL:
            raise BadParameter(
                f"opcm.tol cannot be {self.tol!r} with the read-out isotropic",
                f"allowed: {LEAST_ISOTROPIC_TOL:g} to 0.1",
            )

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"A": TensorSpec(spec.name, spec.shape, self._dtype(spec))}

    def elementwise(self, spec: TensorSpec) -> bool:
        return not self._projects(spec)

    def prepares(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        if not self._projects(spec):
            return {}
        *stack, m, n = spec.shape
        p, dtype = min(m, n), self._dtype(spec)
        return {
            "left": TensorSpec(spec.name, (*stack, m * p), dtype),
            "right": TensorSpec(spec.name, (*stack, n * p), dtype),
            "values": TensorSpec(spec.name, (*stack, p), torch.float64),
        }

    def prepare(self, state: State, spec: TensorSpec) -> State:
        if not self._projects(spec):
            return {}
        if state["A"].ndim == 2:
            left_MP, right_NP, s_P = thin_svd(state["A"], self.tol)
            there = int(s_P.count_nonzero())
            if self.projection == "lead" and there:
                there = self._rank(s_P[:there])
            return {"left": left_MP[:, :there].flatten(), "right": right_NP[:, :there].flatten(), "values": s_P}
        prepared = {
            key: torch.empty(slot.shape, dtype=slot.dtype, device=state["A"].device)
            for key, slot in self.prepares(spec).items()
        }
        for a_MN, *basis in zip(state["A"], *prepared.values(), strict=True):
            for whole, part in zip(basis, thin_svd(a_MN, self.tol), strict=True):
                whole.copy_(part.flatten())
        return prepared

    def workspace(self, spec: TensorSpec) -> int:
        if not self._projects(spec):
            return super().workspace(spec)
        if self.readout == "isotropic":
            return isotropic_bytes(spec.shape, self._dtype(spec).itemsize)
        m, n = spec.shape[-2:]
        compacted = min(m, n) * (m + n) * self._dtype(spec).itemsize  # the directions that are there, once more
        return max(svd_bytes(spec.shape), compacted)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        if not self._projects(spec):
            merged = state["A"] + delta
        else:
            merged = torch.empty_like(state["A"])
            operands = (merged, state["A"], delta, state["left"], state["right"], state["values"])
            for matrix in matrices(*operands):
                self._add_projected(expert.factors, *matrix)
        return {"A": merged}, {"merged": energy(merged)}

    def tally(self, totals: Totals, sums: Sums, expert: Contribution) -> Totals:
        experts = totals.experts + 1
        before = totals.scalars.get("mean_norm", 0.0)
        mean_norm = before + (sqrt(sums["task_vector"]) - before) / experts
        return Totals(experts, {"mean_norm": mean_norm, "merged_norm": sqrt(sums["merged"])})

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if self.readout == "isotropic" and self._projects(spec):
            return torch.add(base, isotropic(state["A"], self.tol), alpha=self.scale)
        merged_norm = totals.scalars.get("merged_norm", 0.0)
        scale = totals.scalars["mean_norm"] / merged_norm if merged_norm else 0.0
        return torch.add(base, state["A"], alpha=scale)

    def figures(self, totals: Totals) -> dict[str, float]:
        mean_norm = totals.scalars.get("mean_norm", 0.0)
        lam = totals.scalars["merged_norm"] / mean_norm if mean_norm else 0.0
        return {**totals.scalars, "lambda": lam}

    def _projects(self, spec: TensorSpec) -> bool:
        return is_projected(spec, self.exclude)

    def _dtype(self, spec: TensorSpec) -> torch.dtype:
        if not self._projects(spec):
            return torch.float32
        if self.accumulator == "auto":
            rounded = spec.dtype == torch.float32 and self.projection != "paper"
            return torch.float32 if rounded and self.readout == "norm" else torch.float64
        return torch.float32 if self.accumulator == "float32" else torch.float64

    def _add_projected(
        self,
        factors: Factors | None,
        merged_MN: Tensor,
        a_MN: Tensor,
        tau_MN: Tensor,
        left: Tensor,
        right: Tensor,
        s_P: Tensor,
    ) -> None:
        """merged = A + P(tau; A) for one matrix, of which `left`, `right` and `s` are the singular vectors and values.

        The directions that lead go as a block of M ("code", "lead") or as its rows and columns ("paper"), the others by
        its diagonal, or all at once ("lead", which then has the leading ones alone).
        """
        directions, dtype = int(s_P.count_nonzero()), a_MN.dtype
        moved = tau_MN[0].any() or tau_MN.any()  # a row says it of most at once
        if not directions or not moved:  # the first expert that trains this matrix is taken whole
            # In float64 from its factors, where it has them: rounded to float32 it would have every direction.
            whole_MN = factors[0] @ factors[1] if factors and dtype == torch.float64 else tau_MN
            torch.add(a_MN, whole_MN, out=merged_MN)
            return
        if self.projection == "lead":
            directions = self._rank(s_P[:directions])
        left_MP, right_NP = (
            flat.view(side, flat.numel() // side)[:, :directions]
            for flat, side in zip((left, right), a_MN.shape, strict=True)
        )
        tail_P, s_P = s_P[directions:], s_P[:directions]
        left_XP, tau_XN = left_MP, tau_MN  # L' tau is left_XP' tau_XN, over the rows of tau, or over those of `down`
        if factors:
            up_MK, tau_XN = (factor.to(dtype) for factor in factors)
            left_XP = up_MK.T @ left_MP
        r = directions if self.projection == "lead" else self._rank(s_P)
        lead_NR = right_NP[:, :r]
        core_RR = a_MN.new_zeros(r, r)
        diagonal_P = torch.zeros_like(s_P)
        across_RN = a_MN.new_zeros(r if self.projection == "paper" else 0, len(right_NP))
        height = max(rows.stop - rows.start for x in (tau_MN, tau_XN) for rows in row_blocks(x))
        work_BP = a_MN.new_empty(height, directions)  # for a block at a time
        for rows in row_blocks(tau_XN):
            tau_BN, left_BP = tau_XN[rows].to(dtype), left_XP[rows]
            right_BP = torch.mm(tau_BN, right_NP, out=work_BP[: len(tau_BN)])
            core_RR.addmm_(left_BP[:, :r].T, right_BP[:, :r])
            diagonal_P += right_BP.mul_(left_BP).sum(0)
            if self.projection == "paper":
                across_RN.addmm_(left_BP[:, :r].T, tau_BN)
        across_RN -= core_RR[: len(across_RN)] @ lead_NR.T
        kept = 1.0  # of A itself
        if self.projection == "lead" and tail_P.any():
            along = sum(float((a_MN[rows].double() * tau_MN[rows]).sum()) for rows in row_blocks(a_MN))
            c = (along - float(s_P @ diagonal_P)) / float(tail_P @ tail_P)
            core_RR.diagonal().sub_(c * s_P.to(dtype))  # c A_tail is c A less its leading part
            kept -= c
        narrow_P = diagonal_P.to(dtype)
        for rows in row_blocks(tau_MN):
            tau_BN = up_MK[rows] @ tau_XN if factors else tau_MN[rows].to(dtype)
            left_BP, merged_BN = left_MP[rows], merged_MN[rows]
            gone_BP = torch.mul(left_BP, narrow_P, out=work_BP[: len(tau_BN)])
            gone_BP[:, :r] = tau_BN @ lead_NR if self.projection == "paper" else left_BP[:, :r] @ core_RR
            torch.addmm(tau_BN, gone_BP, right_NP.T, alpha=-1, out=merged_BN)
            if self.projection == "paper":
                merged_BN.addmm_(left_BP[:, :r], across_RN, alpha=-1)
            merged_BN.add_(a_MN[rows], alpha=kept)

    def _rank(self, s_P: Tensor) -> int:
        """How many directions lead, by their cumulative share of the nuclear norm.

        "code", "lead": as many as do not exceed alpha. "paper": the fewest that reach it. Added up on the CPU: a device
        adds in another order, not always the same.
        """
        s_P = s_P.cpu()
        share_P = s_P.cumsum(0) / s_P.sum()
        if self.projection != "paper":
            return len(s_P) if self.alpha == 1 else int((share_P <= self.alpha).sum())
        return min(len(s_P), int((share_P < self.alpha).sum()) + 1) if self.alpha else 0
