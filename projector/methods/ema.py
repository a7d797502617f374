"""The exponential moving average of the experts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Ema(Method):
    """The exponential moving average: each expert pulls the running model towards itself.

    The rule of Best-in-TIME, both for the weights a trainer starts from and for those that are deployed: it starts at
    the base. Its authors' other protocols start at the first expert, and then nothing of the base is left in it. The
    state is the running model less the base, so that the base itself is never averaged in low precision.

    >>> spec, ema, running = TensorSpec("w", (1,), torch.float32), Ema(weight=0.5), {"A": torch.zeros(1)}
    >>> for t, new in enumerate([4.0, 8.0], start=1):
    ...     running, _ = ema.update(running, torch.tensor([new]), spec, Contribution(t))
    >>> ema.read(torch.tensor([1.0]), running, Totals(2), spec)
    tensor([6.])
    """

    name = "ema"
    formula = "running_t = weight * expert_t + (1 - weight) * running_{t-1}, running_0 = base, or running_1 = expert_1"
    paper = "Dziadzio et al., TIME, arXiv 2412.06712"

    weight: float = param(0.5, "the newest expert's share", low=0, high=1, idle=0)
    start: str = param("base", "what the first expert is averaged with; first: with nothing", choices=("base", "first"))

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        if self.start == "first" and expert.index == 1:
            return {"A": delta.clone()}, {}
        return {"A": torch.lerp(input=state["A"], end=delta, weight=self.weight)}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["A"])
