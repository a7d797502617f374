"""RegMean: each linear layer is the least-squares fit to what the experts' layers make of their own inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import EXCLUDED, add_product, row_blocks
from projector.errors import BadValues, Reason
from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.methods._curvature import GRAM_HINT, RESIDUE, gram, regresses
from projector.spec import TensorSpec
from projector.text import shown


@dataclass(frozen=True)
class RegMean(Method):
    """Merges linear layers so that outputs on every expert's inputs X_i come closest to its own.

    For the weight W of a torch.nn.Linear, (m, n) with outputs X W', the minimum of sum w_i ||X_i W' - X_i W_i'||^2 is

        W' = (sum G_i)^-1 sum G_i W_i'    with G_i = w_i X_i'X_i, (n, n), its off-diagonal elements scaled down

    Put W_0 + tau_i for W_i and the same is W_0' + (sum G_i)^-1 sum G_i tau_i': it holds for task vectors as it stands.
    The fold keeps sum G_i and H = sum tau_i G_i, and solves M (sum G_i) = H by Cholesky. The ridge, in units of the
    mean diagonal element, holds the layer at the base in directions that no input has. Where rounding leaves sum G_i
    indefinite all the same, the ridge is raised tenfold until it is not. With off_diagonal=1 a rank-deficient sum of
    float32 Gram matrices could not be told from its rounding, hence 0.99 at most. Where experts are taken out and the
    trace of sum G_i is down to rounding, 1e-12 of all that was ever added, the layer is the base's.

    Each expert must bring the Gram matrix of every layer that is regressed: one that lacks it is refused, since there
    is no telling how much its inputs should count. Matrices for which there is none belong in `exclude`; those,
    vectors, scalars and stacks of matrices are averaged. A weight that is kept transposed, as GPT-2's Conv1D, must be
    excluded: its second side is not its inputs.
    """

    name = "regmean"
    formula = "base + H G^-1, G = sum w_i X_i'X_i, H = sum w_i tau_i X_i'X_i; other tensors: mean"
    paper = "Jin et al., RegMean, arXiv 2212.09849"
    order_independent = True
    subtractable = True
    weighted = True

    off_diagonal: float = param(0.95, "factor of a Gram matrix's off-diagonal elements", low=0, high=0.99)
    ridge: float = param(1e-6, "added to the diagonal, in units of its mean", low=1e-9, high=1)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to average")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gram",)

    @property
    def one_sweep(self) -> bool:
        return True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        if not regresses(spec, self.exclude):
            return {"S": TensorSpec(spec.name, spec.shape, torch.float32)}
        n = spec.shape[1]
        return {
            "G": TensorSpec(spec.name, (n, n), torch.float64),
            "H": TensorSpec(spec.name, spec.shape, torch.float64),
            "most": TensorSpec(spec.name, (), torch.float64),  # what G's trace would be had no expert been taken out
        }

    def elementwise(self, spec: TensorSpec) -> bool:
        return not regresses(spec, self.exclude)

    def workspace(self, spec: TensorSpec) -> int:
        if not regresses(spec, self.exclude):
            return super().workspace(spec)
        return 8 * (4 * spec.shape[1] ** 2 + 2 * spec.numel)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        if not regresses(spec, self.exclude):
            return {"S": torch.add(state["S"], delta, alpha=expert.weight)}, {}
        brought_NN = gram(expert, spec)
        g_NN = brought_NN * self.off_diagonal
        g_NN.diagonal().copy_(brought_NN.diagonal())
        return {
            "G": torch.add(state["G"], g_NN, alpha=expert.weight),
            "H": add_product(state["H"].clone(), delta, g_NN, expert.weight, expert.factors),
            "most": state["most"] + abs(expert.weight) * g_NN.trace(),
        }, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if not regresses(spec, self.exclude):
            return torch.add(base, state["S"], alpha=1 / totals.weight if totals.experts else 0.0)
        if not totals.experts or state["G"].trace() <= RESIDUE * state["most"]:
            return base.clone()
        lower_NN = self._cholesky(state["G"], spec)
        merged_MN = base.clone()
        for rows in row_blocks(base):
            merged_MN[rows] += torch.cholesky_solve(state["H"][rows].T, lower_NN).T.to(base.dtype)
        return merged_MN

    def _cholesky(self, g_NN: Tensor, spec: TensorSpec) -> Tensor:
        """L with L L' = G + ridge, (n, n)."""
        mean, ridge = float(g_NN.diagonal().mean()), self.ridge
        lower_NN: Tensor
        while ridge <= 1:
            ridged_NN = g_NN.clone()
            ridged_NN.diagonal().add_(ridge * mean)
            lower_NN, failed = torch.linalg.cholesky_ex(ridged_NN)
            if not failed:
                return lower_NN
            ridge *= 10
        raise BadValues(
            Reason.BAD_SIDECAR,
            f"the Gram matrices of {shown(spec.name)} add up to one that is not positive semidefinite",
            GRAM_HINT,
        )
