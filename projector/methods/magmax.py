"""MagMax: the value of largest magnitude wins."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Magmax(Method):
    """Keeps of all task vectors, weight by weight, the value of largest magnitude.

    Of two values of the same magnitude and opposite sign the newer one wins. In half precision, where task vectors are
    small multiples of one step, that happens often; the order of the experts then matters.

    >>> spec, magmax, state = TensorSpec("w", (3,), torch.float32), Magmax(scale=0.5), {"A": torch.zeros(3)}
    >>> for t, delta in enumerate([[4.0, -1.0, 2.0], [-6.0, 0.5, -2.0]], start=1):
    ...     state, _ = magmax.update(state, torch.tensor(delta), spec, Contribution(t))
    >>> magmax.read(torch.tensor([10.0, 10.0, 10.0]), state, Totals(2), spec)
    tensor([7.0000, 9.5000, 9.0000])
    """

    name = "magmax"
    formula = "base + scale * tau_i where |tau_i| is largest, newest first among equals"
    paper = "Marczak et al., MagMax, arXiv 2407.06322"

    scale: float = param(0.5, "factor of what is kept", low=-10, high=10, idle=0)

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": torch.where(delta.abs() >= state["A"].abs(), delta, state["A"])}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["A"], alpha=self.scale)
