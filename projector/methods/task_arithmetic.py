"""Task arithmetic: the scaled sum of task vectors."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from projector.algebra.linalg import energy
from projector.method import Contribution, Method, State, Sums, Totals, idle, param
from projector.spec import TensorSpec

ROUNDING = 1e-6  # a sum whose norm is a smaller share of its summands' is rounding alone


@dataclass(frozen=True)
class TaskArithmetic(Method):
    """The sum of all task vectors times a scale; norm and per_sqrt keep it from growing with T.

    "norm" gives the merged task vector the experts' mean norm, or zero where the experts cancel out up to rounding;
    "per_sqrt" is c / sqrt(T).
    """

    name = "task_arithmetic"
    formula = "base + scale * S; scale: a number, norm: mean(||tau||) / ||S||, per_sqrt: c / sqrt(T)"
    paper = "Ilharco et al., Task arithmetic, arXiv 2212.04089"
    order_independent = True
    subtractable = True
    weighted = True

    scale: float | str = param(
        0.3, "factor of the sum, or a rule for it", low=-10, high=10, choices=("norm", "per_sqrt"), idle=0
    )
    c: float = param(1.0, "numerator of per_sqrt", low=0, high=10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale == "per_sqrt" and not self.c:
            raise idle(self.name, "c", self.c, "0 to 10 but not 0")

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"S": TensorSpec(spec.name, spec.shape, torch.float32)}

    @property
    def grows(self) -> bool:
        return self.scale != "norm"

    @property
    def one_sweep(self) -> bool:
        return self.scale != "norm"

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        total = torch.add(state["S"], delta, alpha=expert.weight)
        sums = {"sum": energy(total)} if self.scale == "norm" else {}
        return {"S": total}, sums

    def tally(self, totals: Totals, sums: Sums, expert: Contribution) -> Totals:
        counted = super().tally(totals, sums, expert)
        scalars = dict(counted.scalars)
        if self.scale == "per_sqrt":
            scalars["scale"] = self.c / sqrt(counted.experts) if counted.experts else 0.0
        elif self.scale == "norm":
            norm = sqrt(sums["sum"])
            norms = totals.scalars.get("norms", 0.0) + expert.weight * sqrt(sums["task_vector"])
            some = counted.experts and norm > ROUNDING * norms
            scalars["norms"], scalars["scale"] = norms, norms / counted.weight / norm if some else 0.0
        else:
            scalars["scale"] = float(self.scale) if counted.experts else 0.0
        return Totals(counted.experts, scalars)

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["S"], alpha=totals.scalars.get("scale", 0.0))
