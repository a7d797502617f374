"""Every method, ours and a stranger's, through the laws; and proof that each law catches what it is there for."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from projector.errors import BadParameter
from projector.laws.checks import (
    LAWS,
    Law,
    blocks_equal_the_whole,
    every_shape_is_taken,
    finite_in_finite_out,
    zero_delta_is_harmless,
)
from projector.laws.trial import SHAPES, merge, stream
from projector.method import Contribution, Method, State, Sums, Survey, Totals, method_params, param
from projector.methods import make, methods
from projector.spec import TensorSpec

ROOT = Path(__file__).parents[3]


AT_ENDS = (zero_delta_is_harmless, finite_in_finite_out, every_shape_is_taken, blocks_equal_the_whole)
"""What the end of a range may break; it takes no other way through a method than the values inside."""

SPECS = [TensorSpec(name, shape, torch.float32) for name, shape in SHAPES.items()]


def variants(name: str) -> Iterator[tuple[dict[str, Any], Sequence[Law]]]:
    """The defaults and each choice of each parameter under all laws; each end of a range, or the value next to it."""
    yield {}, LAWS
    for key, about in method_params(methods()[name]).items():
        inwards = ((about["low"], 1e-6), (about["high"], -1e-6))
        ends = [end + step if end is not None and end == about["idle"] else end for end, step in inwards]
        for values, laws in ((about["choices"] or (), LAWS), (ends, AT_ENDS)):
            for value in values:
                if value is not None and value != about["default"]:
                    yield {key: value}, laws


def idle(method: Method, law: Law) -> bool:
    """True where an end of a range can show the law nothing that the other laws at that end do not see.

    A method that is elementwise sees no rank, and finite_in_finite_out has every shape; one that is not is never cut
    into blocks.
    """
    elementwise = [method.elementwise(spec) for spec in SPECS]
    return (law is every_shape_is_taken and all(elementwise)) or (
        law is blocks_equal_the_whole and not any(elementwise)
    )


def cases() -> Iterator[Any]:
    for name in methods():
        for params, laws in variants(name):
            words = ", ".join(f"{key}={value}" for key, value in params.items())
            for law in laws:
                marks = [pytest.mark.slow] if laws is AT_ENDS and idle(make(name, params), law) else []
                yield pytest.param(name, params, law, id=f"{name}({words}):{law.__name__}", marks=marks)


@pytest.mark.parametrize(("name", "params", "law"), [*cases()])
def test_law(name: str, params: dict[str, Any], law: Law) -> None:
    law(make(name, params))


def idlers(name: str) -> Iterator[dict[str, Any]]:
    """Zero and each end of a range of each parameter, beside the defaults and beside each choice of another one."""
    about = method_params(methods()[name])
    chosen = [{key: word} for key, one in about.items() for word in one["choices"] or ()]
    for key, one in about.items():
        if one["low"] is not None:
            for value in {0.0, one["low"], one["high"]} - {None}:
                yield from ({key: type(one["default"])(value), **other} for other in ({}, *chosen) if key not in other)


@pytest.mark.parametrize("name", methods())
def test_no_number_that_is_allowed_makes_experts_change_nothing(name: str) -> None:
    base, experts = stream(2)
    for params in idlers(name):
        try:
            method = make(name, params)
        except BadParameter:
            continue
        weights = merge(method, base, experts)[0]
        assert any(not tensor.equal(base[key]) for key, tensor in weights.items()), params


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((name, "density", 0) for name in ("ties", "continual_ties", "breadcrumbs", "breadcrumbs_ties")),
        *((name, "gamma", 1) for name in ("breadcrumbs", "breadcrumbs_ties")),
        ("pcb", "ratio", 0.0),
        ("ema", "weight", 0.0),
        ("task_arithmetic", "scale", -0.0),
    ],
)
def test_a_share_of_nothing_is_refused(name: str, key: str, value: float) -> None:
    with pytest.raises(BadParameter, match="no expert would change anything") as refused:
        make(name, {key: value})
    assert f"but not {abs(value):g}" in refused.value.hint
    assert make(name, {key: abs(value - 1e-6)})


def test_a_share_of_nothing_is_refused_only_where_it_is_in_use() -> None:
    assert make("dare", {"density": 0}) and make("task_arithmetic", {"c": 0})
    for name, params in (("dare", {"then": "ties", "density": 0}), ("task_arithmetic", {"scale": "per_sqrt", "c": 0})):
        with pytest.raises(BadParameter, match="no expert would change anything"):
            make(name, params)


@dataclass(frozen=True)
class Honest(Method):
    """A weighted mean that keeps every law. The broken methods below differ from it in one thing each."""

    name = "honest"
    formula = "base + weight * S / T"
    paper = "none"

    weight: float = param(1.0, "a factor", low=0, high=1)

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["A"], alpha=self.weight / max(1, totals.experts))


class MovesTheBase(Honest):
    """Reads something else than the base before the first expert."""

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return super().read(base, state, totals, spec) + (0.0 if totals.experts else 1.0)


class NeverStill(Honest):
    """An expert equal to the base moves it."""

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta + 0.01}, {}


class Normalises(Honest):
    """Divides by the expert's norm, which may be zero."""

    def elementwise(self, spec: TensorSpec) -> bool:
        return False

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta / delta.norm()}, {}


class AddsInPlace(Honest):
    """Updates the state that it was given."""

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"].add_(delta)}, {}


class ReadsInPlace(Honest):
    """Adds to the base that it was given."""

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return base.add_(super().read(base, state, totals, spec) - base)


class Rolls(Honest):
    """Draws from torch's global generator."""

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta * torch.rand(())}, {}


class Hoards(Honest):
    """Keeps one more accumulator from the eleventh expert on."""

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        extra = {"newest": delta} if expert.index > 10 else {}
        return {"A": state["A"] + delta, **extra}, {}


class HoardsScalars(Honest):
    """Keeps one scalar per expert."""

    def tally(self, totals: Totals, sums: Sums, expert: Contribution) -> Totals:
        return Totals(totals.experts + 1, {**totals.scalars, f"expert_{totals.experts}": 1.0})


class Explodes(Honest):
    """Overflows float32 where a task vector is large."""

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta * delta.square().square().square()}, {}


class LosesFigures(Honest):
    """A scalar becomes infinite where a task vector is large; the weights stay finite."""

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta}, {"large": float(delta.abs().sum() > 1e3)}

    def tally(self, totals: Totals, sums: Sums, expert: Contribution) -> Totals:
        return Totals(totals.experts + 1, {"figure": float("inf") if sums["large"] else 0.0})


class NeedsFullRank(Honest):
    """Cannot take a task vector of low rank."""

    def elementwise(self, spec: TensorSpec) -> bool:
        return False

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        low = delta.ndim == 2 and delta.any() and int(torch.linalg.matrix_rank(delta)) < min(delta.shape)
        return {"A": state["A"] + delta * (float("nan") if low else 1.0)}, {}


class TrustsFactorsTooFar(Honest):
    """Takes an adapter's factors for its delta at half the size."""

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        if expert.factors:
            up, down = expert.factors
            delta = (up @ down / 2).float()
        return {"A": state["A"] + delta}, {}


class LooksAtTheBlock(Honest):
    """Declares itself elementwise, and depends on the largest value of the block at hand."""

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta * delta.abs().max() if delta.numel() else state["A"]}, {}


class ForgetsParams(Honest):
    """Does not list its parameters."""

    def params(self) -> dict[str, Any]:
        return {}


class RoundsItsSurvey(Honest):
    """Adds up numbers in a survey whose float32 sum depends on the order of the tensors."""

    rounds: ClassVar[int] = 1

    def elementwise(self, spec: TensorSpec) -> bool:
        return False

    def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Survey:
        share = {"bias": 2.0**25, "wide.weight": -(2.0**25)}.get(spec.name, 1.0)
        return {"sum": torch.tensor(share, dtype=torch.float32)}

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta / (1 + expert.surveys[0]["sum"].abs())}, {}


class PrefersTheNewest(Honest):
    """Says that the order of the experts does not matter, while the newest counts most."""

    order_independent = True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": torch.lerp(state["A"], delta, 0.5)}, {}


class PreparesInSecret(Honest):
    """What it prepares depends on more than the state: on how often it was asked."""

    asked: ClassVar[list[str]] = []

    def elementwise(self, spec: TensorSpec) -> bool:
        return False

    def prepares(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"half": TensorSpec(spec.name, (), torch.float64)}

    def prepare(self, state: State, spec: TensorSpec) -> State:
        if spec.name == "bias":
            self.asked.append(spec.name)
        return {"half": torch.tensor(float(len(self.asked)), dtype=torch.float64)}

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta * (0.5 + state["half"].float() * (spec.name == "bias"))}, {}


class SweepsTooEarly(Honest):
    """Says that its weights may be written while the expert is folded, and scales them by what it has seen so far."""

    one_sweep = True
    seen: ClassVar[list[float]] = []

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        self.seen.append(float(delta.abs().sum()))
        return {"A": state["A"] + delta}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["A"], alpha=sum(self.seen))


class ForeseesWrongly(Honest):
    """Scales its weights by a sum over the model, which it does not know while the expert is folded."""

    one_sweep = True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + delta}, {"moved": float(delta.any())}

    def tally(self, totals: Totals, sums: Sums, expert: Contribution) -> Totals:
        return Totals(totals.experts + 1, {"moved": float(sums.get("moved", 0.0) > 0)})

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["A"], alpha=totals.scalars.get("moved", 0.0) / max(1, totals.experts))


class NeverForgets(Honest):
    """Says that an expert can be taken out again, and counts it a second time."""

    subtractable = True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        return {"A": state["A"] + abs(expert.weight) * delta}, {}


class CountsAllAlike(Honest):
    """Says that the experts' weights count, and never looks at them."""

    weighted = True


class SeesTheBlock(Honest):
    """What it keeps of an expert, and so its view, depends on the largest value of the block at hand."""

    def keeps(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"largest": TensorSpec(spec.name, (spec.shape or (1,))[:1], torch.float32)}

    def keep(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        largest = float(delta.abs().max()) if delta.numel() else 0.0
        return {"largest": torch.full((delta.shape or (1,))[:1], largest)}

    def view(self, base: Tensor, state: State, record: State, sums: Sums, spec: TensorSpec) -> Tensor:
        return base + record["largest"].sum()


# One broken method (or two) per law, and every law that sees what is wrong with it.
BROKEN: Mapping[Method, set[str]] = {
    MovesTheBase(): {"no_expert_reads_the_base"},
    NeverStill(): {"zero_delta_is_harmless"},
    Normalises(): {"zero_delta_is_harmless", "finite_in_finite_out"},
    AddsInPlace(): {"arguments_are_never_mutated"},
    ReadsInPlace(): {"arguments_are_never_mutated"},
    Rolls(): {
        "same_input_same_bits",
        "blocks_equal_the_whole",
        "order_of_tensors_does_not_matter",
        "factors_only_save_work",
    },
    Hoards(): {"state_has_constant_size"},
    HoardsScalars(): {"state_has_constant_size"},
    Explodes(): {"finite_in_finite_out"},
    LosesFigures(): {"finite_in_finite_out"},
    NeedsFullRank(): {"every_shape_is_taken", "factors_only_save_work"},
    TrustsFactorsTooFar(): {"factors_only_save_work"},
    LooksAtTheBlock(): {"blocks_equal_the_whole"},
    PreparesInSecret(): {
        "same_input_same_bits",
        "blocks_equal_the_whole",
        "order_of_tensors_does_not_matter",
        "prepared_or_not_gives_the_same_bits",
    },
    SweepsTooEarly(): {
        "one_sweep_equals_two",
        "blocks_equal_the_whole",
        "same_input_same_bits",
        "order_of_tensors_does_not_matter",
    },
    ForgetsParams(weight=0.25): {"params_round_trip"},
    RoundsItsSurvey(): {"order_of_tensors_does_not_matter"},
    PrefersTheNewest(): {"order_of_experts_does_not_matter"},
    NeverForgets(): {"an_expert_can_be_taken_out"},
    CountsAllAlike(): {"weights_count"},
    SeesTheBlock(): {"every_expert_has_its_view"},
}


def breaks(method: Method) -> set[str]:
    """The laws that `method` does not pass."""
    caught = set()
    for law in LAWS:
        try:
            law(method)
        except Exception:
            caught.add(law.__name__)
    return caught


def test_an_honest_method_breaks_no_law() -> None:
    assert breaks(Honest()) == set()


def test_weights_written_under_totals_that_turned_out_others_are_written_again() -> None:
    assert breaks(ForeseesWrongly()) == set()


@pytest.mark.parametrize(("method", "laws"), [*BROKEN.items()], ids=lambda value: type(value).__name__)
def test_a_broken_method_is_caught(method: Method, laws: set[str]) -> None:
    assert breaks(method) == laws


def test_every_law_catches_something() -> None:
    assert set().union(*BROKEN.values()) == {law.__name__ for law in LAWS}


STRANGER = '''
from dataclasses import dataclass

import torch

from projector.method import Method, TensorSpec, Totals, param


@dataclass(frozen=True)
class LoudFisher(Method):
    """Fisher-weighted mean of the task vectors; an expert that is loud (by a survey) counts for less."""

    name = "loud_fisher"
    formula = "base + sum(c F tau) / sum(c F)"
    paper = "none"
    needs = ("fisher",)
    rounds = 2

    floor: float = param(1e-6, "the least Fisher", low=0, high=1)

    def slots(self, spec):
        return {key: TensorSpec(spec.name, spec.shape, torch.float32) for key in ("num", "den")}

    def elementwise(self, spec):
        return True

    def survey(self, state, delta, spec, expert):
        assert expert.sidecars["fisher"].shape == delta.shape
        if not delta.numel():
            return {}
        if not expert.surveys:
            return {"size": torch.tensor(delta.numel())}
        assert int(expert.surveys[0]["size"]) > 0
        return {"loud": (delta.abs() > 0.1).sum()}

    def update(self, state, delta, spec, expert):
        first, second = expert.surveys
        assert first.get("size", torch.tensor(1)) >= second.get("loud", torch.tensor(0))
        weight = (expert.sidecars["fisher"] + self.floor) / (1 + second.get("loud", torch.tensor(0)))
        return {"num": state["num"] + weight * delta, "den": state["den"] + weight}, {}

    def read(self, base, state, totals, spec):
        return base + state["num"] / state["den"].clamp_min(1e-30)


@dataclass(frozen=True)
class GramMean(Method):
    """Folds each layer's Gram matrix beside the task vectors."""

    name = "gram_mean"
    formula = "base + S / T"
    paper = "none"
    needs = ("gram",)

    def slots(self, spec):
        slots = {"S": TensorSpec(spec.name, spec.shape, torch.float32)}
        if len(spec.shape) == 2:
            slots["G"] = TensorSpec(spec.name, (spec.shape[1], spec.shape[1]), torch.float32)
        return slots

    def update(self, state, delta, spec, expert):
        grams = {"G": state["G"] + expert.sidecars["gram"]} if "G" in state else {}
        return {"S": state["S"] + delta, **grams}, {}

    def read(self, base, state, totals, spec):
        return base + state["S"] / max(1, totals.experts)
'''

LAWS_FOR_THE_STRANGER = """
from projector.laws import LAWS
from projector.methods import make, methods

for name in ("loud_fisher", "gram_mean"):
    for law in LAWS:
        law(make(name))
print(*methods())
"""


def test_a_method_of_another_package_is_found_and_held_to_the_laws(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text(STRANGER)
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mainstem.methods]\nloud_fisher = stranger:LoudFisher\ngram_mean = stranger:GramMean\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", LAWS_FOR_THE_STRANGER],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == sorted([*methods(), "loud_fisher", "gram_mean"])
    assert "loud_fisher" not in methods()
