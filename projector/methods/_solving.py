"""For methods that solve matrices, each as a whole, and average all else."""

from abc import abstractmethod

import torch
from torch import Tensor

from projector.algebra.linalg import is_projected
from projector.method import Contribution, Method, State, Sums, Totals
from projector.spec import TensorSpec


class Solving(Method):
    """Keeps `own_slots` of what it solves; of all else S = sum w_i tau_i, which it reads out as the mean."""

    exclude: tuple[str, ...]

    @abstractmethod
    def own_slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The slots of a tensor that is solved."""

    @abstractmethod
    def room(self, spec: TensorSpec) -> int:
        """The `workspace` of such a tensor."""

    @abstractmethod
    def fold(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        """Its accumulators with this expert."""

    @abstractmethod
    def solve(self, base: Tensor, state: State, spec: TensorSpec) -> Tensor:
        """The merged tensor, with one expert or more."""

    def solves(self, spec: TensorSpec) -> bool:
        """Whether it solves this tensor."""
        return is_projected(spec, self.exclude)

    @property
    def one_sweep(self) -> bool:
        return True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return self.own_slots(spec) if self.solves(spec) else {"S": TensorSpec(spec.name, spec.shape, torch.float32)}

    def elementwise(self, spec: TensorSpec) -> bool:
        return not self.solves(spec)

    def workspace(self, spec: TensorSpec) -> int:
        return self.room(spec) if self.solves(spec) else super().workspace(spec)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        if self.solves(spec):
            return self.fold(state, delta, spec, expert), {}
        return {"S": torch.add(state["S"], delta, alpha=expert.weight)}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if not totals.experts:
            return base.clone()
        if self.solves(spec):
            return self.solve(base, state, spec)
        return torch.add(base, state["S"], alpha=1 / totals.weight)
