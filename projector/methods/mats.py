"""MaTS: experts are merged by solving, for all of them at once, the linear system that their curvatures pose."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from projector.algebra.linalg import EXCLUDED, add_product
from projector.errors import BadParameter
from projector.method import Contribution, State, param
from projector.methods._curvature import RESIDUE, fisher, gram, regresses
from projector.methods._solving import Solving
from projector.spec import TensorSpec

TOL = {"gram": 1e-6, "fisher": 32 * torch.finfo(torch.float64).eps}  # a Gram matrix may be rounded to float32


@dataclass(frozen=True)
class Mats(Solving):
    """Matches the experts in their task subspaces, by conjugate gradients.

    C_i is the curvature of expert i's loss: "gram", X'X of each linear layer's inputs, or "fisher", the diagonal
    Fisher of every weight. The descent always starts at task arithmetic with scale 1.0, base + S, and stops after
    `iterations` or once nothing is left but rounding, which is that of float32 with Gram matrices; where no C_i has
    curvature it stays at its start. Seen from the base the system is (sum C_i) x = sum C_i tau_i with x_0 = S, which
    takes the same steps. Curvature that is down to rounding after experts were taken out, 1e-12 of all that was ever
    added (of a Gram matrix: its trace), counts as none.

    With "gram", an expert whose weight times inputs lies three decades or more below another's is hardly fitted where
    it alone has inputs: what it would change is no larger than the rounding of the other's Gram matrix.

    The Kronecker-factored Fisher of the paper has no such fold: a sum of Kronecker products is not one itself, and
    would have to be kept term by term.

    The state does not depend on the order of the experts, but conjugate gradients amplify rounding until they have
    converged: all is float64 here, and still a last bit may grow to 1e-4 of a task vector where the curvatures within a
    tensor span three decades or more and `iterations` ends the descent early.

    What `exclude` names is averaged. With "gram", matrices of torch.nn.Linear are solved, (m, n) with n inputs, and
    each expert must bring all their Gram matrices; other tensors and stacks of matrices are averaged too. A weight that
    is kept transposed, as GPT-2's Conv1D, must be excluded.

    Each tensor is one system and is solved whole, in about 100 bytes per weight with "fisher": an embedding that
    `exclude` does not name may not fit into memory, and such a base is refused at the start with both numbers.
    """

    name = "mats"
    formula = "base + x, (sum w_i C_i) x = sum w_i C_i tau_i from x = S"
    paper = "Tam et al., MaTS, arXiv 2312.04339"
    order_independent = True
    subtractable = True
    weighted = True

    curvature: str = param("gram", "what each expert brings", choices=("gram", "fisher"))
    iterations: int = param(100, "steps at most", low=1, high=10000)
    exclude: tuple[str, ...] = param(EXCLUDED, "globs of tensors to average")

    def __post_init__(self) -> None:
        if self.curvature == "kronecker":
            raise BadParameter(
                "mats.curvature cannot be 'kronecker': sums of Kronecker products do not fit in a state of fixed size",
                "allowed: gram, fisher",
            )
        super().__post_init__()

    @property
    def products(self) -> int:
        return super().products + (self.iterations if self.curvature == "gram" else 0)

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.curvature,)

    def own_slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        if self.curvature == "gram":
            c = TensorSpec(spec.name, (spec.shape[1], spec.shape[1]), torch.float64)
            most = TensorSpec(spec.name, (), torch.float64)
        else:
            c = TensorSpec(spec.name, spec.shape, torch.float64)
            most = TensorSpec(spec.name, spec.shape, torch.float32)
        return {
            "C": c,
            "H": TensorSpec(spec.name, spec.shape, torch.float64),
            "S": TensorSpec(spec.name, spec.shape, torch.float64),
            "most": most,  # what C, or its trace, would be had no expert been taken out
        }

    def room(self, spec: TensorSpec) -> int:
        square = spec.shape[1] ** 2 if self.curvature == "gram" else spec.numel
        return 8 * (4 * square + 8 * spec.numel)

    def fold(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        total = torch.add(state["S"], delta.to(state["S"].dtype), alpha=expert.weight)
        if self.curvature == "gram":
            c = gram(expert, spec)
            h = add_product(state["H"].clone(), delta, c, expert.weight, expert.factors)
        else:
            c = fisher(expert, spec, delta)
            h = torch.add(state["H"], c * delta.double(), alpha=expert.weight)
        most = state["most"] + (self._mass(c) * abs(expert.weight)).to(state["most"].dtype)
        return {"C": torch.add(state["C"], c, alpha=expert.weight), "H": h, "S": total, "most": most}

    def solve(self, base: Tensor, state: State, spec: TensorSpec) -> Tensor:
        gone = self._mass(state["C"]) <= RESIDUE * state["most"]
        c, h = state["C"].masked_fill(gone, 0.0), state["H"].masked_fill(gone, 0.0)

        def curved(x: Tensor) -> Tensor:
            return x @ c if self.curvature == "gram" else x * c

        return base + conjugate_gradients(curved, h, state["S"], self.iterations, TOL[self.curvature]).to(base.dtype)

    def solves(self, spec: TensorSpec) -> bool:
        if self.curvature == "gram":
            return regresses(spec, self.exclude)
        return not any(fnmatchcase(spec.name, glob) for glob in self.exclude)

    def _mass(self, c: Tensor) -> Tensor:
        """What tells curvature from rounding: the trace of a Gram matrix, (); a Fisher weight by weight."""
        return c.trace() if self.curvature == "gram" else c


def conjugate_gradients(
    curved: Callable[[Tensor], Tensor], b: Tensor, start: Tensor, iterations: int, tol: float
) -> Tensor:
    """x with curved(x) = b, where `curved` is symmetric and positive semidefinite; float64, any shape.

    Stops early once the residual is at `tol` of the terms that it is the difference of. What is left then is rounding,
    and a step would divide it by the rounding that stands where there is no curvature.
    """
    image = curved(start)
    x, residual = start, b - image
    direction, squared = residual, _dot(residual, residual)
    rounding = tol**2 * (_dot(b, b) + _dot(image, image))
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
