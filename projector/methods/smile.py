"""SMILE: beside the merged model, the leading singular triplets of each of the last experts, for a router to choose.

A model with routed layers, `mainstem export`, chooses among these experts by each layer's input. Without a router what
is kept of all experts counts alike. How many experts are kept apart is bounded: one that must make room joins a sum, as
far as it is kept, so that the read-out knows nothing of who was kept apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import BLOCK_NUMEL, EXCLUDED, is_projected, row_blocks
from projector.algebra.svd import svd_bytes, thin_svd
from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.spec import TensorSpec

TOL = 1e-6  # of s_0: below, a triplet of a task matrix is rounding


@dataclass(frozen=True)
class Smile(Method):
    """Keeps the leading singular triplets of each of the last experts beside the model, for a router to choose among.

    Of a task matrix tau (m, n) these are L (m, q), s (q) and R (n, q). `mainstem export` makes a model of them in which
    each layer adds, for each token x, what the `top_k` experts say whom its router chooses:

        y = W x + b + sum_i p_i (L_i diag(s_i) R_i' x + d_i)        p: softmax of ||R_i' x||

    of the first `rank` triplets and, in the router, the first `gate_rank`; d is how the expert moved the bias, and the
    p of those chosen are made to sum to one. W and b are the base's, and with more than `cap` experts the base's and
    the mean share of those that had to make room, the oldest.

    WHAT IS PUBLISHED ROUTES NOTHING: it is the plain mean of what is kept of all, which is the mean of all experts
    where their ranks fit. Every vector that is called a bias is kept whole, as nobody knows whether a layer adds it;
    embeddings, norms, stacks and convolutions are averaged alone.

    >>> spec, smile = TensorSpec("w", (2, 2), torch.float32), Smile(cap=2, rank=1, gate_rank=1)
    >>> state = {key: torch.zeros(slot.shape) for key, slot in smile.slots(spec).items()}
    >>> for t, delta in enumerate([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 6.0]], [[0.0, 9.0], [0.0, 0.0]]], 1):
    ...     state, _ = smile.update(state, torch.tensor(delta), spec, Contribution(t))
    >>> state["S"], state["s"].flatten()
    (tensor([[3., 0.],
            [0., 0.]]), tensor([9., 6.]))
    >>> smile.read(torch.zeros(2, 2), state, Totals(3), spec)
    tensor([[1., 3.],
            [0., 2.]])
    """

    name = "smile"
    formula = "base + (sum L_i diag(s_i) R_i') / T of each expert's first triplets; routed: see `mainstem export`"
    paper = "Tang et al., SMILE, arXiv 2408.10174"

    cap: int = param(8, "experts that are kept apart, the newest", low=1, high=256)
    rank: int = param(32, "singular triplets of a matrix that make an expert", low=1, high=65536)
    gate_rank: int = param(16, "singular triplets of a matrix that the router looks at", low=1, high=65536)
    top_k: int = param(1, "experts that the router chooses for a token", low=1, high=256)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to average")

    @property
    def one_sweep(self) -> bool:
        return True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """S: the sum of what is not kept apart. Place (i - 1) % cap of the others is expert i's, until i + cap comes.

        L (cap, m, q), R (cap, n, q) and s (cap, 1, q) of a matrix, D (cap, m) of a bias.
        """
        shapes: dict[str, tuple[int, ...]] = {"S": spec.shape}
        if self.routes(spec):
            m, n = spec.shape
            q = self._kept(spec)
            shapes |= {"L": (self.cap, m, q), "R": (self.cap, n, q), "s": (self.cap, 1, q)}
        elif self.biases(spec):
            shapes["D"] = (self.cap, *spec.shape)
        return {key: TensorSpec(spec.name, shape, torch.float32) for key, shape in shapes.items()}

    def elementwise(self, spec: TensorSpec) -> bool:
        return not self.routes(spec) and not self.biases(spec)

    def workspace(self, spec: TensorSpec) -> int:
        if not self.routes(spec):
            return super().workspace(spec)
        m, n = spec.shape
        blocks = 4 * (3 * min(m * n, BLOCK_NUMEL) + self.rank * m)
        return max(svd_bytes(spec.shape) + 4 * min(m, n) * (m + n), blocks)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        if self.elementwise(spec):
            return {"S": state["S"] + delta}, {}
        new = {key: state[key].clone() for key in self.slots(spec)}
        place = (expert.index - 1) % self.cap
        if not self.routes(spec):
            new["S"] += new["D"][place]
            new["D"][place] = delta
            return new, {}
        if expert.index > self.cap:
            self._add(new["S"], new, place)
        q = self._kept(spec)
        left_MP, right_NP, s_P = thin_svd(delta, TOL)
        new["L"][place], new["R"][place], new["s"][place, 0] = left_MP[:, :q], right_NP[:, :q], s_P[:q]
        return new, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if not totals.experts:
            return base.clone()
        return torch.add(base, self.summed(state, totals, spec), alpha=1 / totals.experts)

    def shared(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        """The tensor beneath a router: the base, and of a matrix or a bias the mean share of who had to make room.

        The rest is the base's, as in the authors' code: experts change it together, or not at all.
        """
        if self.elementwise(spec) or not totals.experts:
            return base.clone()
        return torch.add(base, state["S"], alpha=1 / totals.experts)

    def summed(self, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        """What is kept of all experts, added up."""
        total = state["S"].clone()
        if self.routes(spec):
            for place in range(min(self.cap, totals.experts)):
                self._add(total, state, place)
        elif self.biases(spec):
            total += state["D"].sum(0)
        return total

    def places(self, totals: Totals) -> list[int]:
        """The places of the experts that are kept apart, the oldest first."""
        apart = min(self.cap, totals.experts)
        return [(index - 1) % self.cap for index in range(totals.experts - apart + 1, totals.experts + 1)]

    def routes(self, spec: TensorSpec) -> bool:
        """True for what may be a layer's matrix."""
        return len(spec.shape) == 2 and is_projected(spec, self.exclude)

    def biases(self, spec: TensorSpec) -> bool:
        """True for what may be a layer's bias, by its name."""
        return len(spec.shape) == 1 and spec.name.endswith("bias")

    def _kept(self, spec: TensorSpec) -> int:
        """q: the triplets that are kept of a matrix."""
        return min(max(self.rank, self.gate_rank), *spec.shape)

    def _add(self, total_MN: Tensor, state: State, place: int) -> None:
        """Adds the matrix of the expert in that place, in blocks of rows."""
        left_MR = (state["L"][place] * state["s"][place])[:, : self.rank]
        right_NR = state["R"][place, :, : self.rank]
        for rows in row_blocks(total_MN):
            total_MN[rows].addmm_(left_MR[rows], right_NR.T)
