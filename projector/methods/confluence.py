"""Confluence: no expert is disturbed much, no direction outweighs another, and every expert comes through whole.

Each step is by sums of the stream, and none has a scale that is left to be tuned:

1. R, the merged matrix that disturbs the experts least (_interference.py; WUDI's loss, arXiv 2503.08099), by what their
   layers read and by what they write; the side that asks for the smaller change of S counts more.
2. R's spectrum, made the flatter (Iso-C, arXiv 2502.04959) the further R turned away from S: where experts do not meet,
   as it is.
3. The length at which the experts' own parts in it are, taken together, as long as they were, sum w_i <M, tau_i> =
   sum w_i ||tau_i||^2 (by <M, S> that needs no expert). Once they are together longer than a tenth of the base: no
   longer than they would be had they nothing in common.
4. What is added to a network stops acting like a sum once it is long beside the base. Where the experts are, S itself,
   and one expert's length.
"""

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from projector.algebra.linalg import BLOCK_NUMEL, EXCLUDED, energy, gram, matrices, row_blocks
from projector.algebra.svd import svd_bytes, thin_svd
from projector.method import Contribution, State, param
from projector.methods import _interference as interference
from projector.methods._interference import UNTRAINED
from projector.methods._solving import Solving
from projector.spec import TensorSpec

TOL = 1e-5  # of s_0: below, a singular value is rounding
TALL = 8  # outputs for each input from which on L is not kept: a vocabulary's would be larger than the whole model
MOST = 4.0  # in units of <F, S>: how long M becomes; experts that contradict each other would ask for any length
SHARE = 1 / 8  # of the base's length: up to which an expert and what is added to it act like a sum
TOGETHER = 1 / 10  # of it, too: how long experts may be together and yet be made longer


@dataclass(frozen=True)
class Confluence(Solving):
    """Merges linear layers so that each expert is disturbed least and heard whole, whatever their number. S is the sum
    of the experts' matrices tau_i. R, with the singular values s, is the matrix that disturbs them least. G sums up
    what they read, tau_i'tau_i / ||tau_i||^2, and L what they write, tau_i tau_i' / ||tau_i||^2.

    For tau_i of shape (m, n), n the inputs, as torch.nn.Linear keeps them, S = sum w_i tau_i and
    q = sum w_i ||tau_i||^2:

        A = argmin_X sum w_i ||(X - tau_i) tau_i'||^2 / ||tau_i||^2 + lambda ||X - S||^2        by the inputs
        B = argmin_X sum w_i ||tau_i' (X - tau_i)||^2 / ||tau_i||^2 + mu ||X - S||^2            by the outputs
        R = (b A + a B) / (a + b)       a = ||A - S||^2, b = ||B - S||^2         U diag(s) V' = R
        E = U diag(s / sqrt(s^2 + k^2 s_0^2)) V' / ||..||         k = knee cot^2(R, S)
        F = (p E + (1 - p) S / ||S||) / ||..||                    p = min(1, max(0, 2 - (8 x sin(R, S))^2))
        l = min(q / <F, S>, 4 <F, S>, sqrt(q) max(1, 0.1 / y))    e^2 = q / sum w_i
        M = scale * sqrt(e^2 + p (l^2 - e^2)) F where l > e, else scale * l F
            y^2 = sum w_i ||tau_i'tau_i|| / ||W_0'W_0||           x^2 = y^2 / sum w_i

    lambda is `ridge` times the mean input's share of sum w_i tau_i'tau_i / ||tau_i||^2, mu the same of the outputs.
    One side alone would remove what the other one keeps apart anyway; but R = A where m > 8 n, as in the output layer
    of a language model, whose outputs are words and an (m, m) matrix of them larger than the model.

    Of l: q / <F, S> is where sum w_i <M, tau_i> = q. sqrt(q) is how long experts are together that are orthogonal, and
    y that in units of the base's matrix W_0; where they contradict each other, <F, S> is small and q / <F, S> has no
    bound. e is one expert's length, and x that in units of W_0.

    x and y are by the Schatten 4-norm, which a task vector of few directions, as an adapter's, has more of than by all
    its elements. Beyond 1/8 R is what disturbs a sum least and not the network, and nothing is gained by it; experts
    that do not meet (R = S) are merged in full whatever the base. An expert of weight 2 counts as two of its kind, one
    that left a matrix as it was does not count in it. Embeddings, vectors and scalars are averaged.

    >>> from projector.method import Totals
    >>> spec, method = TensorSpec("w", (2, 2), torch.float32), Confluence()
    >>> state = {key: torch.zeros(slot.shape, dtype=slot.dtype) for key, slot in method.slots(spec).items()}
    >>> for t, delta in enumerate([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]], start=1):
    ...     state, _ = method.update(state, torch.tensor(delta), spec, Contribution(t))
    >>> method.read(torch.zeros(2, 2), state, Totals(2), spec).round(decimals=2)
    tensor([[3., 0.],
            [0., 1.]])
    """

    name = "confluence"
    formula = (
        "base + c U diag(s / sqrt(s^2 + k^2 s_0^2)) V' of wudi's ridge solutions of both sides, k from how far they"
        " turn from S, c from sum w_i <., tau_i> and sum w_i ||tau_i||^2, nearer to S where experts are long beside the"
        " base; else: mean"
    )
    paper = "mainstem's own; after WUDI, arXiv 2503.08099, and Iso-C, arXiv 2502.04959"
    order_independent = True
    subtractable = True
    weighted = True

    scale: float = param(1.0, "factor of merged matrices", low=0, high=10)
    ridge: float = param(0.1, "what holds R at S, in units of the mean diagonal of G, and of L", low=1e-6, high=1e3)
    knee: float = param(
        0.1, "share of s_0 down to which R's spectrum is evened out, at 45 degrees to S", low=1e-6, high=10
    )
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to average")

    def own_slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """S, G, H, q = sum w_i (||tau_i||^2, ||tau_i'tau_i||) and, up to m = 8 n, L = sum w_i tau_i tau_i' /
        ||tau_i||^2.
        """
        *stack, m, _ = spec.shape
        further = {"q": (*stack, 1, 2)} | ({"L": (*stack, m, m)} if _by_outputs(spec) else {})
        return interference.sums(spec) | {
            key: TensorSpec(spec.name, shape, torch.float64) for key, shape in further.items()
        }

    def room(self, spec: TensorSpec) -> int:
        m, n = spec.shape[-2:]
        side = max(m, n) if _by_outputs(spec) else n
        solved = 8 * (3 * side**2 + 4 * min(m * n, BLOCK_NUMEL)) + 4 * 4 * m * n
        return max(solved, svd_bytes(spec.shape)) + 4 * (2 * m * n + min(m, n) * (m + n))

    def fold(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        sums = {key: state[key].clone() for key in self.own_slots(spec) if key != "S"}
        for tau_MN, g_NN, h_MN, q_12, *l_MM in matrices(delta, *sums.values()):
            lengths = interference.add(tau_MN, expert.weight, expert.factors, g_NN, h_MN)
            q_12 += expert.weight * q_12.new_tensor(lengths)
            for outputs_MM in l_MM:
                interference.add_outputs(tau_MN, expert.weight, expert.factors, outputs_MM)
        return {"S": torch.add(state["S"], delta, alpha=expert.weight), **sums}

    def solve(self, base: Tensor, state: State, spec: TensorSpec) -> Tensor:
        merged = base.clone()
        sums = (state[key] for key in self.own_slots(spec))
        for merged_MN, s_MN, g_NN, h_MN, q_12, *l_MM in matrices(merged, *sums):
            weight = float(g_NN.trace())  # of those that trained it
            if weight > UNTRAINED:
                q, fourth = q_12.flatten().tolist()
                ours = float(gram(merged_MN if len(s_MN) > len(g_NN) else merged_MN.T).norm())
                r_MN = self._undisturbing(s_MN, g_NN, h_MN, *l_MM)
                self._add(merged_MN, r_MN, s_MN, q, weight, fourth / ours if ours else inf)
        return merged

    def _undisturbing(self, s_MN: Tensor, g_NN: Tensor, h_MN: Tensor, l_MM: Tensor | None = None) -> Tensor:
        """R."""
        a_MN = interference.least(s_MN, g_NN, h_MN, self.ridge)
        if l_MM is None:
            return a_MN.add_(s_MN)
        b_MN = interference.least(s_MN.T, l_MM, h_MN.T, self.ridge).T
        a, b = energy(a_MN), energy(b_MN)
        if a + b:
            a_MN = a_MN.mul_(b / (a + b)).add_(b_MN, alpha=a / (a + b))
        return a_MN.add_(s_MN)

    def _add(self, merged_MN: Tensor, r_MN: Tensor, s_MN: Tensor, q: float, weight: float, long: float) -> None:
        """Adds scale * M to the base's `merged_MN` in place. weight: sum w_i of those that trained it; long: y^2."""
        left_MP, right_NP, s_P = thin_svd(r_MN, TOL)
        if not s_P.any() or not s_MN.any():  # experts that add up to nothing: none is heard in anything
            return
        turned = sine_squared(r_MN, s_MN)
        even_P = s_P / torch.hypot(turned * s_P, self.knee * (1 - turned) * s_P[0])
        left_MP = left_MP * (even_P / even_P.norm()).to(left_MP.dtype)
        heard = sum(float(torch.sum((s_MN[rows] @ right_NP).double() * left_MP[rows])) for rows in row_blocks(s_MN))
        if not heard > 0:
            return
        p, size_of_s = _like_a_sum(long / weight, turned), sqrt(energy(s_MN))
        size = sqrt(p**2 + (1 - p) ** 2 + 2 * p * (1 - p) * heard / size_of_s)  # of p E + (1 - p) S / ||S||
        length = _length((p * heard + (1 - p) * size_of_s) / size, q, long)
        one = q / weight  # e^2
        factor = self.scale * sqrt(one + p * (length**2 - one) if length**2 > one else length**2) / size
        left_MP *= factor * p
        for rows in row_blocks(merged_MN):
            merged_MN[rows] += left_MP[rows] @ right_NP.T
            if p < 1:
                merged_MN[rows] += factor * (1 - p) / size_of_s * s_MN[rows]


def _like_a_sum(long: float, turned: float) -> float:
    """p. long: x^2; turned: sin^2(R, S)."""
    return min(1.0, max(0.0, 2 - long * turned / SHARE**2)) if turned else 1.0


def _length(heard: float, q: float, long: float) -> float:
    """l. heard: <F, S>; long: y^2."""
    room = TOGETHER / sqrt(long) if long > 0 else inf
    return min(q / heard, MOST * heard, sqrt(q) * max(1.0, room))


def _by_outputs(spec: TensorSpec) -> bool:
    m, n = spec.shape[-2:]
    return m <= TALL * n


def sine_squared(x_MN: Tensor, y_MN: Tensor) -> float:
    """Of the angle between two matrices that are not zero, 0..1, in float64."""
    dot = sum(float(torch.sum(x_MN[rows].double() * y_MN[rows])) for rows in row_blocks(x_MN))
    return max(0.0, 1 - dot**2 / (energy(x_MN) * energy(y_MN)))
