"""The base, whatever arrives."""

from dataclasses import dataclass

from torch import Tensor

from projector.method import Contribution, Method, State, Sums, Totals
from projector.spec import TensorSpec


@dataclass(frozen=True)
class ZeroShot(Method):
    """The base, whatever arrives: a start from which every expert is trained apart from all others."""

    name = "zero_shot"
    formula = "base"
    paper = "Dziadzio et al., TIME, arXiv 2412.06712: offline merging"
    order_independent = True
    subtractable = True
    own_statistics = True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {}

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return base
