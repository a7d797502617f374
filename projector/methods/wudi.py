"""WUDI: the merged task vector that disturbs each expert least where its own task vector acts.

The loss, and the sums S, G and H that it is made of, stand in _interference.py: with M_0 = S the descent from the
stream's sums is the offline one.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from projector.algebra.linalg import BLOCK_NUMEL, EXCLUDED, matrices, row_blocks
from projector.method import Contribution, State, param
from projector.methods import _interference as interference
from projector.methods._interference import UNTRAINED
from projector.methods._solving import Solving
from projector.spec import TensorSpec

MOMENTUM, SQUARES, EPS = 0.9, 0.999, 1e-8  # Adam's betas and epsilon
ROUNDING = 1e-6  # a row of R no larger than this share of the row of S G is rounding alone


@dataclass(frozen=True)
class Wudi(Solving):
    """Merges linear layers so that every expert is disturbed least, judged by its task vector.

    M minimises sum w_i ||(M - tau_i) tau_i'||^2 / ||tau_i||^2 for tau_i of shape (m, n), n the inputs, as
    torch.nn.Linear keeps them. Solver "ridge" is the exact minimum of that loss plus lambda ||M - S||^2, lambda being
    `ridge` times the mean diagonal element of G:

        M = S - (S G - H) (G + lambda I)^-1

    Solver "adam" is the paper's: a number of steps from M = S. Their number and size are part of the method, for the
    descent stops far from the minimum: a weight moves by `lr` times `steps` at most, which is little beside experts
    that moved further than those of the paper (docs/quality.md); it is then hardly more than the sum.

    Ridge holds M at S rather than at zero, as the descent does by its start: a direction in which hardly any expert
    moved keeps the sum, and a single expert comes out whole. An expert of weight 2 counts as two of its kind. A task
    vector of zero disturbs nothing and is skipped. Embeddings, vectors and scalars are averaged.

    A read-out with "ridge" costs about two products (m, n) x (n, n); "adam" costs `steps` of them.
    """

    name = "wudi"
    formula = "base + argmin_M sum w_i ||(M - tau_i) tau_i'||^2 / ||tau_i||^2 from M = S; other tensors: mean"
    paper = "Cheng et al., WUDI, arXiv 2503.08099"
    order_independent = True
    subtractable = True
    weighted = True

    solver: str = param("ridge", "how M is found from S, G and H; adam: as published", choices=("ridge", "adam"))
    steps: int = param(300, "Adam's steps", low=0, high=1000)
    lr: float = param(1e-5, "Adam's step size", low=0, high=1e-3)
    ridge: float = param(1e-2, "what holds M at S, in units of G's mean diagonal", low=1e-6, high=1e3)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to average")

    @property
    def products(self) -> int:
        return super().products + (self.steps if self.solver == "adam" else 0)

    @property
    def grows(self) -> bool:
        return self.solver == "adam"

    def own_slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return interference.sums(spec)

    def room(self, spec: TensorSpec) -> int:
        m, n = spec.shape[-2:]
        return 8 * (3 * n * n + 4 * min(m * n, BLOCK_NUMEL)) + 4 * 6 * m * n  # squares; blocks; the descent in float32

    def fold(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        g, h = state["G"].clone(), state["H"].clone()
        for tau_MN, g_NN, h_MN in matrices(delta, g, h):
            interference.add(tau_MN, expert.weight, expert.factors, g_NN, h_MN)
        return {"S": torch.add(state["S"], delta, alpha=expert.weight), "G": g, "H": h}

    def solve(self, base: Tensor, state: State, spec: TensorSpec) -> Tensor:
        merged = torch.add(base, state["S"])
        for merged_MN, s_MN, g_NN, h_MN in matrices(merged, state["S"], state["G"], state["H"]):
            if g_NN.trace() > UNTRAINED:
                if self.solver == "adam":
                    merged_MN += self._descended(s_MN, g_NN, h_MN)
                else:
                    merged_MN += interference.least(s_MN, g_NN, h_MN, self.ridge)
        return merged

    def _descended(self, s_MN: Tensor, g_NN: Tensor, h_MN: Tensor) -> Tensor:
        """D after Adam's steps from D = 0, float32.

        Adam moves a weight by about lr however small its gradient is: rows of R that are rounding alone stay in place.
        """
        r_MN = torch.empty_like(s_MN)
        for rows in row_blocks(s_MN):
            r_BN = interference.disturbed(s_MN[rows], g_NN, h_MN[rows])
            whole_B = (r_BN + h_MN[rows]).norm(dim=1)
            r_MN[rows] = r_BN.masked_fill_((r_BN.norm(dim=1) <= ROUNDING * whole_B)[:, None], 0.0)
        narrow_NN = g_NN.to(s_MN.dtype)
        d_MN, mean_MN, squares_MN = (torch.zeros_like(s_MN) for _ in range(3))
        for t in range(1, self.steps + 1):
            gradient_MN = torch.addmm(r_MN, d_MN, narrow_NN).mul_(2)
            mean_MN.lerp_(gradient_MN, 1 - MOMENTUM)
            squares_MN.mul_(SQUARES).addcmul_(gradient_MN, gradient_MN, value=1 - SQUARES)
            size_MN = torch.sqrt(squares_MN, out=gradient_MN).div_(sqrt(1 - SQUARES**t)).add_(EPS)
            d_MN.addcdiv_(mean_MN, size_MN, value=-self.lr / (1 - MOMENTUM**t))
        return d_MN
