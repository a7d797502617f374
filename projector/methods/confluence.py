"""Confluence: no expert is disturbed much, no direction outweighs another, and every expert comes through whole.

Three known steps, each by sums of the stream, and one new one, the length:

1. R, the merged matrix that disturbs the experts least (_interference.py; WUDI's loss, arXiv 2503.08099): half of what
   has to change of S by what their layers read, half by what they write.
2. Its spectrum made flat, the flatter the more experts there are (Iso-C, arXiv 2502.04959).
3. The length at which the experts' own parts in it are, taken together, as long as they were:
   sum w_i <M, tau_i> = sum w_i ||tau_i||^2. By <M, S> that needs no expert, and no scale is left to be tuned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import BLOCK_NUMEL, EXCLUDED, is_projected, matrices, row_blocks
from projector.algebra.svd import svd_bytes, thin_svd
from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.methods import _interference as interference
from projector.methods._interference import UNTRAINED
from projector.spec import TensorSpec

MOST = 2.0  # in units of sqrt(q): how long M becomes; experts that contradict each other would ask for any length


@dataclass(frozen=True)
class Confluence(Method):
    """Merges linear layers so that each expert is disturbed least and heard whole, whatever their number.

    For tau_i of shape (m, n), n the inputs, as torch.nn.Linear keeps them, W the sum of weights, S = sum w_i tau_i and
    q = sum w_i ||tau_i||^2:

        A = argmin_X sum w_i ||(X - tau_i) tau_i'||^2 / ||tau_i||^2 + lambda ||X - S||^2        the side of the inputs
        B = argmin_X sum w_i ||tau_i' (X - tau_i)||^2 / ||tau_i||^2 + mu ||X - S||^2            that of the outputs
        R = (A + B) / 2         U diag(s) V' = R
        F = U diag(s^(1 / W^2)) V' / ||..||         the spectrum of one expert as it is, flat for many
        M = scale * (q / <F, S>) F                  so that sum w_i <M, tau_i> = q

    lambda is `ridge` times the mean input's share of sum w_i tau_i'tau_i / ||tau_i||^2, mu the same of the outputs. One
    side alone would remove what the other one keeps apart anyway. Where experts contradict each other, <F, S> is small
    and q / <F, S> has no bound: M is never longer than 4 <F, S>, which is to say than 2 sqrt(q). Directions with
    s_i <= tol s_0 are left out: what is made equal to the others should not be rounding. An expert of weight 2 counts
    as two of its kind. Embeddings, vectors and scalars are averaged.

    >>> spec, method = TensorSpec("w", (2, 2), torch.float32), Confluence()
    >>> state = {key: torch.zeros(slot.shape, dtype=slot.dtype) for key, slot in method.slots(spec).items()}
    >>> for t, delta in enumerate([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]], start=1):
    ...     state, _ = method.update(state, torch.tensor(delta), spec, Contribution(t))
    >>> method.read(torch.zeros(2, 2), state, Totals(2), spec).round(decimals=2)
    tensor([[2.6600, 0.0000],
            [0.0000, 2.0200]])
    """

    name = "confluence"
    formula = (
        "base + c U diag(s^(1/W^2)) V' of wudi's ridge solutions of both sides,"
        " sum w_i <., tau_i> = sum w_i ||tau_i||^2; else: mean"
    )
    paper = "mainstem's own; after WUDI, arXiv 2503.08099, and Iso-C, arXiv 2502.04959"
    order_independent = True
    subtractable = True
    weighted = True

    scale: float = param(1.0, "factor of merged matrices", low=0, high=10)
    ridge: float = param(0.1, "what holds R at S, in units of the mean diagonal of G, and of L", low=1e-6, high=1e3)
    tol: float = param(1e-2, "singular values up to tol times the largest are left out", low=1e-6, high=0.5)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to average")

    @property
    def one_sweep(self) -> bool:
        return True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """S, G, H, L = sum w_i tau_i tau_i' / ||tau_i||^2 and q = sum w_i ||tau_i||^2 of each matrix."""
        if not self._solves(spec):
            return {"S": TensorSpec(spec.name, spec.shape, torch.float32)}
        *stack, m, _ = spec.shape
        wide = {"L": (*stack, m, m), "q": (*stack, 1, 1)}
        return interference.sums(spec) | {
            key: TensorSpec(spec.name, shape, torch.float64) for key, shape in wide.items()
        }

    def elementwise(self, spec: TensorSpec) -> bool:
        return not self._solves(spec)

    def workspace(self, spec: TensorSpec) -> int:
        if not self._solves(spec):
            return super().workspace(spec)
        m, n = spec.shape[-2:]
        solved = 8 * (3 * max(m, n) ** 2 + 4 * min(m * n, BLOCK_NUMEL)) + 3 * 4 * m * n
        return max(solved, svd_bytes(spec.shape)) + 4 * (2 * m * n + min(m, n) * (m + n))

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        total = torch.add(state["S"], delta, alpha=expert.weight)
        if not self._solves(spec):
            return {"S": total}, {}
        sums = {key: state[key].clone() for key in ("G", "H", "L", "q")}
        for tau_MN, g_NN, h_MN, l_MM, q_11 in matrices(delta, *sums.values()):
            q_11 += expert.weight * interference.add(tau_MN, expert.weight, expert.factors, g_NN, h_MN)
            interference.add_outputs(tau_MN, expert.weight, expert.factors, l_MM)
        return {"S": total, **sums}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if not totals.experts:
            return base.clone()
        if not self._solves(spec):
            return torch.add(base, state["S"], alpha=1 / totals.weight)
        merged = base.clone()
        sums = (state[key] for key in ("S", "G", "H", "L", "q"))
        for merged_MN, s_MN, g_NN, h_MN, l_MM, q_11 in matrices(merged, *sums):
            if g_NN.trace() > UNTRAINED:
                r_MN = interference.least(s_MN, g_NN, h_MN, self.ridge)
                r_MN += interference.least(s_MN.T, l_MM, h_MN.T, self.ridge).T
                r_MN = r_MN.div_(2).add_(s_MN)
                self._add(merged_MN, r_MN, s_MN, float(q_11), totals.weight)
        return merged

    def _solves(self, spec: TensorSpec) -> bool:
        return is_projected(spec, self.exclude)

    def _add(self, merged_MN: Tensor, r_MN: Tensor, s_MN: Tensor, q: float, weight: float) -> None:
        """Adds scale * M to `merged_MN` in place."""
        left_MP, right_NP, s_P = thin_svd(r_MN, self.tol)
        flat_P = torch.where(s_P > 0, s_P.pow(1 / max(1.0, weight) ** 2), 0.0)
        if not flat_P.any():
            return
        left_MP = left_MP * (flat_P / flat_P.norm()).to(left_MP.dtype)
        heard = sum(float(torch.sum((s_MN[rows] @ right_NP).double() * left_MP[rows])) for rows in row_blocks(s_MN))
        left_MP *= self.scale * min(q / heard, MOST**2 * heard) if heard > 0 else 0.0
        for rows in row_blocks(merged_MN):
            merged_MN[rows] += left_MP[rows] @ right_NP.T
