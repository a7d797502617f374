"""How far a merged matrix is off on each expert's task, judged by the task vectors themselves, as WUDI measures it.

A linear layer's task vector tau_i, (m, n) with n inputs, is made of outer products with inputs that the layer saw in
training, so that tau_i tau_i' stands in for the data, and

    loss(M) = sum_i w_i ||(M - tau_i) tau_i'||^2 / ||tau_i||^2

measures how far M is off on each task. The offline method holds every tau_i. But ||X tau'||^2 = trace(X tau'tau X'), so

    gradient = 2 sum_i w_i (M - tau_i) tau_i'tau_i / ||tau_i||^2 = 2 (M G - H)
    G = sum_i w_i tau_i'tau_i / ||tau_i||^2             (n, n), the trace of which is sum w_i
    H = sum_i w_i tau_i tau_i'tau_i / ||tau_i||^2       (m, n)

With M = S + D, S = sum w_i tau_i, the gradient is 2 (D G + R), where R = S G - H is what S disturbs: R is taken in
float64, because H almost cancels S G where experts hardly disturb each other, and D may then be float32.
"""

import torch
from torch import Tensor

from projector.algebra.linalg import add_product, gram, row_blocks
from projector.method import Factors
from projector.spec import TensorSpec

UNTRAINED = 1e-9  # of G's trace, the sum of weights: less is the rounding left by experts that were taken out


def sums(spec: TensorSpec) -> dict[str, TensorSpec]:
    """The slots of S, G and H."""
    *stack, _, n = spec.shape
    return {
        "S": TensorSpec(spec.name, spec.shape, torch.float32),
        "G": TensorSpec(spec.name, (*stack, n, n), torch.float64),
        "H": TensorSpec(spec.name, spec.shape, torch.float64),
    }


def add(tau_MN: Tensor, weight: float, factors: Factors | None, g_NN: Tensor, h_MN: Tensor) -> tuple[float, float]:
    """Adds one task matrix to G and H in place; its ||tau||^2 and ||tau'tau||. One of zero disturbs nothing and is
    skipped.
    """
    own_NN = gram(tau_MN, factors)
    fourth = float(own_NN.norm())
    squared_norm = _weigh(own_NN, weight)
    if squared_norm:
        g_NN += own_NN
        add_product(h_MN, tau_MN, own_NN, factors=factors)
    return squared_norm, fourth


def add_outputs(tau_MN: Tensor, weight: float, factors: Factors | None, l_MM: Tensor) -> None:
    """Adds w tau tau' / ||tau||^2 to L (m, m) in place: what G is of the transposed task matrix, whose H is H'."""
    own_MM = gram(tau_MN.T, (factors[1].T, factors[0].T) if factors else None)
    if _weigh(own_MM, weight):
        l_MM += own_MM


def _weigh(own_NN: Tensor, weight: float) -> float:
    """Makes tau'tau w tau'tau / ||tau||^2, in place; ||tau||^2. Zero both where tau is."""
    squared_norm = float(own_NN.trace())
    if squared_norm:
        own_NN *= weight / squared_norm
    return squared_norm


def disturbed(s_BN: Tensor, g_NN: Tensor, h_BN: Tensor) -> Tensor:
    """Rows of R = S G - H, float64."""
    return torch.addmm(h_BN, s_BN.double(), g_NN, beta=-1)


def least(s_MN: Tensor, g_NN: Tensor, h_MN: Tensor, ridge: float) -> Tensor:
    """D = -R (G + lambda I)^-1, float32, where loss(S + D) + lambda ||D||^2 is least; lambda is `ridge` times the mean
    diagonal element of G.
    """
    ridged_NN = g_NN.clone()
    ridged_NN.diagonal().add_(ridge * g_NN.diagonal().mean())
    lower_NN = torch.linalg.cholesky(ridged_NN)
    d_MN = torch.empty_like(s_MN)
    for rows in row_blocks(s_MN):
        d_MN[rows] = -torch.cholesky_solve(disturbed(s_MN[rows], g_NN, h_MN[rows]).T, lower_NN).T
    return d_MN
