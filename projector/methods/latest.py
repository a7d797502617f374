"""The newest expert itself."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.method import Contribution, Method, State, Sums, Totals
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Latest(Method):
    """The newest expert itself, with nothing of those before it.

    Fine-tuning that goes on from the last checkpoint, as a head: what a trainer starts from, or what is deployed.
    What is kept is its task vector: in float32 a weight that is far from the base's can be off in the last digit.

    >>> spec, latest, state = TensorSpec("w", (1,), torch.float32), Latest(), {"A": torch.zeros(1)}
    >>> for t, delta in enumerate([4.0, 8.0], start=1):
    ...     state, _ = latest.update(state, torch.tensor([delta]), spec, Contribution(t))
    >>> latest.read(torch.tensor([1.0]), state, Totals(2), spec)
    tensor([9.])
    """

    name = "latest"
    formula = "expert_t"
    paper = "Dziadzio et al., TIME, arXiv 2412.06712: continual fine-tuning"
    own_statistics = True

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": delta.clone()}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["A"])
