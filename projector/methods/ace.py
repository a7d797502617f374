"""ACE-Merging: each expert's task vector stands for the inputs that it was trained on.

A linear layer's task vector tau_t, (m, n) with n inputs, is made of outer products with those inputs, so that the
second moment of its rows, C_t = tau_t'tau_t with their mean taken out, (n, n), estimates the inputs' covariance.
RegMean's closed form then needs no data:

    M = (sum_t tau_t (C_t + eps I)) (sum_t (C_t + eps I) + prior)^-1

and is made of sums. Which of two sets of sums is read depends on how much the experts differ, which only the last one
decides; both are kept. The mean over the rows, mu' = 1'tau / m, is not: (1/m) 1' sum tau C is what it comes to.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import BLOCK_NUMEL, EXCLUDED, add_product, gram, matrices, row_blocks
from projector.algebra.svd import svd_bytes, thin_svd
from projector.method import Contribution, Factors, State, param
from projector.methods._solving import Solving
from projector.spec import TensorSpec

TINY = 1e-12  # beside a trace: as the authors have it, and of a task vector's share that its rows do not have in common
FLOOR = 1e-13  # of the largest diagonal element: what rounding may take from the least eigenvalue of a sum
TOL = 1e-6  # of s_0: below, a direction of the refinement is rounding
FIGURES = 6  # of a matrix: experts, their weights, and these over the centred traces; sums of logs, squares, traces


@dataclass(frozen=True)
class Ace(Solving):
    """Merges linear layers by the inputs' covariances, which each task vector tells of itself.

    For tau_t of shape (m, n), n the inputs, as torch.nn.Linear keeps them, with X - 1 (1'X) / m written centred(X),
    e_t = ||tau_t||^2, and C_t = centred(tau_t)'centred(tau_t):

        M = sum_t centred(tau_t) (C_t + eps I) (sum_t (C_t + eps I) + 1 c')^-1          c = (sum_t C_t) 1 / n

    Where the experts' energies differ much, that is var(log e_t) > heterogeneity * mean(log e_t)^2, each C_t and its
    eps are divided by the trace of C_t, and c by the mean of all e_t; M is then refined by the spectrum:

        M + mean(s_1 ... s_k) U_k V_k'                                                     k = floor(share * min(m, n))
        U diag(s) V' = M + sum_t tau_t C_t - (sum_t tau_t) (sum_t (C_t + eps I)) / T

    This is the rule of the authors' code, whose constants are the defaults; of their text only the
    introduction could be read, which agrees. Decided here, where the code divides by nothing or makes up directions: a
    task vector of zero, or one whose rows are all alike, says nothing of a layer and is skipped there; a refinement of
    no direction (k = 0) is none; directions with s_i <= 1e-6 s_1 are left out of U_k V_k', since rounding alone decides
    where they point. An expert of weight w counts w times in all sums; how much experts differ is asked of the experts,
    whatever their weights. The logarithms make that a question of units: the same experts ten
    times as far from the base may be told to differ less, or more. Embeddings, vectors and scalars are averaged.
    """

    name = "ace"
    formula = "base + scale * sum w_i tau_i C_i (sum w_i C_i + prior)^-1, C_i = tau_i'tau_i + eps I; else: mean"
    paper = "Xu et al., ACE-Merging, arXiv 2603.02945"
    order_independent = True
    subtractable = True
    weighted = True

    eps: float = param(1e-2, "added to each C's diagonal", low=1e-6, high=1e3)
    normalise: str = param(
        "auto", "divide each C by its trace; auto: where experts differ much", choices=("auto", "always", "never")
    )
    heterogeneity: float = param(0.3, "auto: how much that is, of the energies' logarithms", low=0, high=10)
    share: float = param(0.3, "share of the directions that are refined where C is divided", low=0, high=1)
    scale: float = param(1.0, "factor of merged matrices", low=0, high=10)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to average")

    @property
    def products(self) -> int:
        return 2 * super().products

    @property
    def grows(self) -> bool:
        return self.normalise == "always"  # by what is refined

    def own_slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        *stack, _, n = spec.shape
        shapes: dict[str, tuple[int, ...]] = {"S": spec.shape, "figures": (*stack, 1, FIGURES)}
        if self.normalise != "always":
            shapes |= {"G": (*stack, n, n), "H": spec.shape}
        if self.normalise != "never":
            shapes |= {"unit_G": (*stack, n, n), "unit_H": spec.shape, "unit_S": spec.shape}
        return {key: TensorSpec(spec.name, shape, torch.float64) for key, shape in shapes.items()}

    def room(self, spec: TensorSpec) -> int:
        m, n = spec.shape[-2:]
        solved = 8 * (4 * n * n + 4 * min(m * n, BLOCK_NUMEL) + 2 * m * n)  # squares; blocks; the sums
        refined = svd_bytes(spec.shape) + 8 * (n * n + 3 * m * n + min(m, n) * (m + n))
        return max(solved, refined)

    def fold(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        sums = {key: state[key].clone() for key in self.own_slots(spec)}
        for tau_MN, *parts in matrices(delta, *sums.values()):
            self._add(tau_MN, expert.factors, expert.weight, dict(zip(sums, parts, strict=True)))
        return sums

    def solve(self, base: Tensor, state: State, spec: TensorSpec) -> Tensor:
        merged, keys = base.clone(), [*self.own_slots(spec)]
        for merged_MN, *parts in matrices(merged, *(state[key] for key in keys)):
            sums = dict(zip(keys, parts, strict=True))
            if float(sums["figures"][0, 0]):  # else nobody trained it, or all who did were taken out
                merged_MN += self.scale * self._merged(sums, Figures(*sums["figures"][0].tolist()))
        return merged

    def _add(self, tau_MN: Tensor, factors: Factors | None, weight: float, sums: Mapping[str, Tensor]) -> None:
        """Adds one task matrix to the sums in place."""
        c_NN = gram(tau_MN, factors)
        energy = float(c_NN.trace())
        mu_N = (factors[0].mean(0) @ factors[1]) if factors else tau_MN.mean(0, dtype=torch.float64)
        c_NN.addr_(mu_N, mu_N, alpha=-len(tau_MN))
        trace = float(c_NN.trace())
        if trace <= TINY * energy:
            return
        trace += TINY
        log = float(torch.log(torch.tensor(energy + TINY, dtype=torch.float64)))
        count = 1.0 if weight > 0 else -1.0
        told = [count, weight, weight / trace, count * log, count * log**2, weight * energy]
        sums["figures"] += torch.tensor(told, dtype=torch.float64, device=c_NN.device)
        sums["S"].add_(tau_MN, alpha=weight)
        if "G" in sums:
            sums["G"].add_(c_NN, alpha=weight)
            add_product(sums["H"], tau_MN, c_NN, weight, factors)
        if "unit_G" in sums:
            c_NN /= trace
            sums["unit_G"].add_(c_NN, alpha=weight)
            add_product(sums["unit_H"], tau_MN, c_NN, weight, factors)
            sums["unit_S"].add_(tau_MN, alpha=weight / trace)

    def _merged(self, sums: Mapping[str, Tensor], told: "Figures") -> Tensor:
        """M of one matrix, float64."""
        divided = self.normalise == "always" or (self.normalise == "auto" and told.spread > self.heterogeneity)
        g_NN, h_MN, s_MN = (sums[key] for key in (("unit_G", "unit_H", "unit_S") if divided else ("G", "H", "S")))
        ridged_NN = g_NN.clone()
        ridge = self.eps * (told.per_trace if divided else told.weight)
        ridged_NN.diagonal().add_(ridge + FLOOR * float(g_NN.diagonal().max()))
        c_N = g_NN.mean(0) / (told.mean_energy + TINY if divided else 1.0)
        m_MN = _solved(centred(h_MN.add(s_MN, alpha=self.eps)), ridged_NN, c_N)
        if not divided or not (k := int(self.share * min(m_MN.shape))):
            return m_MN
        fused_MN = (m_MN + h_MN).addmm_(sums["S"], ridged_NN, alpha=-1 / told.weight)
        left_MP, right_NP, s_P = thin_svd(fused_MN, TOL)
        return m_MN.addmm_(left_MP[:, :k], right_NP[:, :k].T, alpha=float(s_P[:k].mean()))


@dataclass(frozen=True)
class Figures:
    """Of one matrix, over the experts that moved it: their number, the sum of their weights and of these over the
    traces of C; of each as one, the sums of their energies' logarithms and of these squared; of the energies by weight.
    """

    experts: float
    weight: float
    per_trace: float
    logs: float
    squares: float
    energies: float

    @property
    def spread(self) -> float:
        """The variance of the logarithms over the square of their mean; 0 for one expert."""
        if self.experts < 2:
            return 0.0
        mean = self.logs / self.experts
        return (self.squares - self.experts * mean**2) / (self.experts - 1) / (mean**2 + TINY)

    @property
    def mean_energy(self) -> float:
        return self.energies / self.weight


def centred(x_MN: Tensor) -> Tensor:
    """x less the mean of its rows."""
    return x_MN - x_MN.mean(0)


def _solved(b_MN: Tensor, a_NN: Tensor, c_N: Tensor) -> Tensor:
    """B (A + 1 c')^-1 for a positive definite A, by Sherman and Morrison; written over B.

    c is a mean of rows of A less its ridge, and then c'A^-1 1 >= 0: what is divided by is 1 or more.
    """
    lower_NN = torch.linalg.cholesky(a_NN)
    for rows in row_blocks(b_MN):
        b_MN[rows] = torch.cholesky_solve(b_MN[rows].T, lower_NN).T
    ones_N1, c_N1 = (torch.cholesky_solve(x[:, None], lower_NN) for x in (torch.ones_like(c_N), c_N))
    return b_MN.addr_(b_MN.sum(1), c_N1[:, 0], alpha=-1 / (1 + float(c_N @ ones_N1[:, 0])))
