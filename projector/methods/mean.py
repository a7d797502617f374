"""The plain average of all experts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.method import Contribution, Method, State, Sums, Totals
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Mean(Method):
    """The plain average, known as model soup.

    After task vectors of 1, 2 and 6 a weight of the base stands 3 higher:

    >>> stream = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([6.0])]
    >>> spec, mean = TensorSpec("w", (1,), torch.float32), Mean()
    >>> state, totals = {"S": torch.zeros(1)}, Totals()
    >>> for t, delta in enumerate(stream, start=1):
    ...     state, sums = mean.update(state, delta, spec, Contribution(t))
    ...     totals = mean.tally(totals, sums, Contribution(t))
    >>> mean.read(torch.tensor([10.0]), state, totals, spec)
    tensor([13.])
    """

    name = "mean"
    formula = "base + sum w_i tau_i / sum w_i"
    paper = "Wortsman et al., Model soups, arXiv 2203.05482"
    order_independent = True
    subtractable = True
    weighted = True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"S": TensorSpec(spec.name, spec.shape, torch.float32)}

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"S": torch.add(state["S"], delta, alpha=expert.weight)}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["S"], alpha=1 / totals.weight if totals.experts else 0.0)
