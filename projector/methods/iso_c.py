"""Isotropic merging: the sum of task vectors with a flat spectrum."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import EXCLUDED, is_projected
from projector.algebra.svd import isotropic, isotropic_bytes
from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.spec import TensorSpec


@dataclass(frozen=True)
class IsoC(Method):
    """Keeps the singular vectors of the summed task matrices, with all singular values equal.

    With S = U diag(s) V', the sum and not the mean of an (m, n) matrix's task vectors, the merged task vector is
    scale * mean(s) * U V', the mean over all min(m, n) values. Embeddings, vectors and scalars are averaged.

    Every direction comes to weigh the same, so that a rounding of S turns the result by (rounding / s_i): matrices are
    summed in float64. Directions with s_i <= tol * s_0 are left out of U V' and count as zero in the mean, since
    rounding alone decides where they point; a singular value decomposition makes up some vectors for them and gives
    them mean(s) as well.

    >>> spec, iso, total = TensorSpec("w", (2, 2), torch.float32), IsoC(scale=1.0), torch.zeros(2, 2).double()
    >>> for t, delta in enumerate([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -1.0]]], start=1):
    ...     state, _ = iso.update({"S": total}, torch.tensor(delta), spec, Contribution(t))
    ...     total = state["S"]
    >>> iso.read(torch.zeros(2, 2), state, Totals(2), spec).float() + 0.0
    tensor([[ 2.,  0.],
            [ 0., -2.]])
    """

    name = "iso_c"
    formula = "base + scale * mean(s) * U V' of S = U diag(s) V'; other tensors: mean"
    paper = "Marczak et al., No task left behind, arXiv 2502.04959"
    order_independent = True
    subtractable = True
    weighted = True

    scale: float = param(1.0, "factor of merged matrices", low=0, high=10)
    tol: float = param(1e-6, "singular values up to tol times the largest are left out", low=1e-6, high=0.1)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices to average")

    @property
    def grows(self) -> bool:
        return True

    @property
    def one_sweep(self) -> bool:
        return True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        dtype = torch.float64 if self._flattens(spec) else torch.float32
        return {"S": TensorSpec(spec.name, spec.shape, dtype)}

    def elementwise(self, spec: TensorSpec) -> bool:
        return not self._flattens(spec)

    def workspace(self, spec: TensorSpec) -> int:
        return isotropic_bytes(spec.shape, itemsize=8) if self._flattens(spec) else super().workspace(spec)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"S": torch.add(state["S"], delta, alpha=expert.weight)}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if not totals.experts:
            return base.clone()
        if self._flattens(spec):
            return torch.add(base, isotropic(state["S"], self.tol), alpha=self.scale)
        return torch.add(base, state["S"], alpha=1 / totals.weight)

    def _flattens(self, spec: TensorSpec) -> bool:
        return is_projected(spec, self.exclude)
