"""The law of weights: correct methods pass, whatever they ask of an expert, and those that ignore weights do not."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from projector.laws import LAWS
from projector.laws.checks import weights_count
from projector.method import Contribution, Method, State, Sums, Totals
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Weighted(Method):
    """The weighted mean of something that is asked of each task vector."""

    formula = "base + sum w_i f(tau_i) / sum w_i"
    paper = "none"
    weighted = True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def asked(self, delta: Tensor) -> Tensor:
        return delta

    def weight(self, expert: Contribution) -> float:
        return expert.weight

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + self.weight(expert) * self.asked(delta)}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return base + state["A"] / totals.weight if totals.experts else base


class Mean(Weighted):
    """Asks for all of it."""

    name = "mean_of_all"


class MeanOfSigns(Weighted):
    """Asks for the way alone: two experts that go the same way leave a weight nothing to say."""

    name = "mean_of_signs"

    def asked(self, delta: Tensor) -> Tensor:
        return delta.sign()


class MajorityOfSigns(MeanOfSigns):
    """And takes the side that weighs more."""

    name = "majority_of_signs"

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return base + state["A"].sign()


class Faint(Weighted):
    """Hardly moves the base."""

    name = "faint"

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.lerp(base, super().read(base, state, totals, spec), 1e-3)


class Still(Weighted):
    """Keeps to the base, as a method does with a parameter at the end of its range."""

    name = "still"

    def asked(self, delta: Tensor) -> Tensor:
        return torch.zeros_like(delta)


class Ignores(Mean):
    """Looks at no weight; the divisor alone knows them."""

    name = "ignores"

    def weight(self, expert: Contribution) -> float:
        return 1.0


class IgnoresWithSigns(MeanOfSigns):
    """The same of the way alone."""

    name = "ignores_with_signs"

    def weight(self, expert: Contribution) -> float:
        return 1.0


@pytest.mark.parametrize(
    "method", [Mean(), MeanOfSigns(), MajorityOfSigns(), Faint(), Still()], ids=lambda one: one.name
)
def test_a_correct_method_passes(method: Method) -> None:
    for law in LAWS:
        law(method)


@pytest.mark.parametrize("method", [Ignores(), IgnoresWithSigns()], ids=lambda one: one.name)
def test_one_that_ignores_weights_does_not(method: Method) -> None:
    with pytest.raises(AssertionError, match="change nothing"):
        weights_count(method)
