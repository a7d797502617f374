"""Methods that thin out each task vector and leave the merging to another method."""

from abc import abstractmethod

from torch import Tensor

from projector.method import Contribution, Method, State, Sums, Survey, Totals
from projector.spec import TensorSpec


class Thinning(Method):
    """A method whose `thin` says what of a task vector takes part, and whose `merging` says how that is merged."""

    order_independent = True
    weighted = True

    @property
    @abstractmethod
    def merging(self) -> Method:
        """The method that merges the thinned task vectors; order-independent and weighted."""

    @abstractmethod
    def thin(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Tensor:
        """What of `delta` takes part, a new tensor of its shape and dtype."""

    @property
    def subtractable(self) -> bool:  # type: ignore[override]
        return self.merging.subtractable

    @property
    def rounds(self) -> int:  # type: ignore[override]
        return self.merging.rounds

    @property
    def one_sweep(self) -> bool:
        return self.merging.one_sweep

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return self.merging.slots(spec)

    def workspace(self, spec: TensorSpec) -> int:
        return 2 * spec.numel * 4 + self.merging.workspace(spec)

    def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Survey:
        return self.merging.survey(state, self.thin(delta, spec, expert), spec, expert)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return self.merging.update(state, self.thin(delta, spec, expert), spec, expert)

    def tally(self, totals: Totals, sums: Sums, expert: Contribution) -> Totals:
        return self.merging.tally(totals, sums, expert)

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return self.merging.read(base, state, totals, spec)
