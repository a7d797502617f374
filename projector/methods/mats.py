"""MaTS: experts are merged by solving, for all of them at once, the linear system that their curvatures pose."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from projector.curvature import fisher, gram, plus_product, regresses
from projector.errors import BadParameter
from projector.matrices import EXCLUDED
from projector.method import Expert, Method, State, Sums, Totals, param
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Mats(Method):
    """Matches the experts in their task subspaces: (sum C_i) w = sum C_i w_i, by conjugate gradients.

    C_i is the curvature of expert i's loss: "gram", X'X of each linear layer's inputs, or "fisher", the diagonal
    Fisher of every weight. The descent starts at task arithmetic with scale 1, base + S, and stops after `iterations`
    or once nothing is left but rounding; where no C_i has curvature it stays at its start. Seen from the base the
    system is (sum C_i) x = sum C_i tau_i with x_0 = S, which takes the same steps. Each tensor is one system.

    The Kronecker-factored Fisher of the paper has no such fold: a sum of Kronecker products is not one itself, and
    would have to be kept term by term.

    The state does not depend on the order of the experts, but conjugate gradients amplify rounding until they have
    converged: all is float64 here, and still a last bit may grow to 1e-4 of a task vector where the curvatures within a
    tensor span three decades or more and `iterations` ends the descent early.

    With "gram", matrices of torch.nn.Linear are solved, (m, n) with n inputs, and each expert must bring all their Gram
    matrices; other tensors, stacks of matrices and what `exclude` names are averaged. A weight that is kept transposed,
    as GPT-2's Conv1D, must be excluded.
    """

    name = "mats"
    formula = "conjugate gradients on (sum w_i C_i) x = sum w_i C_i tau_i from x = S; base + x"
    paper = "Tam et al., Merging by matching models in task parameter subspaces, arXiv 2312.04339"
    order_independent = True
    subtractable = True
    weighted = True

    curvature: str = param("gram", "what each expert brings", choices=("gram", "fisher"))
    iterations: int = param(100, "steps of the descent at most", low=1, high=10000)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of matrices that are averaged, with curvature gram")

    def __post_init__(self) -> None:
        if self.curvature == "kronecker":
            raise BadParameter(
                "mats.curvature cannot be 'kronecker': sums of Kronecker products do not fit in a state of fixed size",
                "allowed: gram, fisher",
            )
        super().__post_init__()

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.curvature,)

    @property
    def one_sweep(self) -> bool:
        return True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        if not self._solves(spec):
            return {"S": TensorSpec(spec.name, spec.shape, torch.float32)}
        shape = (spec.shape[1], spec.shape[1]) if self.curvature == "gram" else spec.shape
        return {
            "C": TensorSpec(spec.name, shape, torch.float64),
            "H": TensorSpec(spec.name, spec.shape, torch.float64),
            "S": TensorSpec(spec.name, spec.shape, torch.float64),
        }

    def elementwise(self, spec: TensorSpec) -> bool:
        return not self._solves(spec)

    def workspace(self, spec: TensorSpec) -> int:
        if not self._solves(spec):
            return super().workspace(spec)
        square = spec.shape[1] ** 2 if self.curvature == "gram" else spec.numel
        return 8 * (3 * square + 7 * spec.numel)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Expert) -> tuple[State, Sums]:
        total = torch.add(state["S"], delta.to(state["S"].dtype), alpha=expert.weight)
        if not self._solves(spec):
            return {"S": total}, {}
        if self.curvature == "gram":
            c = gram(expert, spec)
            h = plus_product(state["H"], delta, c, expert.weight)
        else:
            c = fisher(expert, spec, delta)
            h = torch.add(state["H"], c * delta.double(), alpha=expert.weight)
        return {"C": torch.add(state["C"], c, alpha=expert.weight), "H": h, "S": total}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if not totals.experts:
            return base.clone()
        if not self._solves(spec):
            return torch.add(base, state["S"], alpha=1 / totals.weight)

        def curved(x: Tensor) -> Tensor:
            return x @ state["C"] if self.curvature == "gram" else x * state["C"]

        return base + conjugate_gradients(curved, state["H"], state["S"], self.iterations).to(base.dtype)

    def _solves(self, spec: TensorSpec) -> bool:
        return self.curvature == "fisher" or regresses(spec, self.exclude)


def conjugate_gradients(curved: Callable[[Tensor], Tensor], b: Tensor, start: Tensor, iterations: int) -> Tensor:
    """x with curved(x) = b, where `curved` is symmetric and positive semidefinite; float64, any shape.

    Stops early once the residual is zero to rounding.
    """
    x, residual = start, b - curved(start)
    direction, squared = residual, _dot(residual, residual)
    rounding = torch.finfo(b.dtype).eps ** 2 * _dot(b, b)
    for _ in range(iterations):
        image = curved(direction)
        bend = _dot(direction, image)
        if squared <= rounding or bend <= 0:
            break
        x = x + direction * (squared / bend)
        residual = residual - image * (squared / bend)
        before, squared = squared, _dot(residual, residual)
        direction = residual + direction * (squared / before)
    return x


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.reshape(-1), y.reshape(-1)))
