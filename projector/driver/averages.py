"""Running statistics are averaged, whatever the method, unless what it gives is one model itself.

What a layer counts of its inputs is no direction that training took: a sum of differences of variances may be negative,
and what is trimmed, projected or scaled is the statistic of nothing. So a head's method folds the weights, and
`rule_of` gives the average for the statistics.
"""

from dataclasses import dataclass
from math import copysign

import torch
from torch import Tensor

from projector.algebra.linalg import widened
from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.spec import TensorSpec

SUM = "statistics"  # no slot of any other method's: what an earlier mainstem summed up as weights is not taken for it


@dataclass(frozen=True)
class Averages(Method):
    """The mean over the experts, by their weights where the head's method counts them.

    by_weight: it does. recorded: the head keeps a record of each expert, in which its own statistics stand.
    """

    name = "averages"
    formula = "base + sum w_i tau_i / sum w_i"
    paper = "-"

    by_weight: bool = param(False, "experts count by their weights")
    recorded: bool = param(False, "each expert's own statistics are kept")

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {SUM: TensorSpec(spec.name, spec.shape, torch.float32)}

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        weight = expert.weight if self.by_weight else copysign(1.0, expert.weight)
        anew = expert.index == 1 and weight > 0  # a second pass over all experts begins with the sum of the first
        total = torch.zeros_like(delta) if anew else state[SUM].to(torch.float32)
        return {SUM: torch.add(total, delta, alpha=weight)}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        share = totals.weight if self.by_weight else totals.experts
        return torch.add(base, state[SUM], alpha=1 / share if totals.experts else 0.0)

    def keeps(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"tau": TensorSpec(spec.name, spec.shape, torch.float32)} if self.recorded else {}

    def keep(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        return {"tau": delta.clone()}

    def view(self, base: Tensor, state: State, record: State, sums: Sums, spec: TensorSpec) -> Tensor:
        return widened(base) + record["tau"]


def rule_of(method: Method, spec: TensorSpec) -> Method:
    """What folds this tensor in a head of that method."""
    if not spec.statistic or method.own_statistics:
        return method
    return Averages(method.weighted, bool(method.keeps(spec)))
