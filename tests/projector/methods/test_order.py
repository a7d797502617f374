"""Recency, slerp, magmax, latest and continual_ties as they stream, against their formulas in float64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from projector.errors import BadParameter, Reason
from projector.laws.trial import merge, stream
from projector.method import Contribution, Method, State, Totals, method_params
from projector.methods import make
from projector.methods.recency import Recency
from projector.spec import TensorSpec
from tests.oracles import order, rules

Tensors = Mapping[str, Tensor]

SCHEMES = method_params(Recency)["scheme"]["choices"]
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # a method and its parameters, which its oracle takes too
    **{f"recency {scheme}": ("recency", {"scheme": scheme}) for scheme in SCHEMES},
    "slerp": ("slerp", {}),
    "slerp 0.992": ("slerp", {"dot_threshold": 0.992}),
    "magmax": ("magmax", {}),
    "magmax 1.0": ("magmax", {"scale": 1.0}),
    "latest": ("latest", {}),
    "continual_ties": ("continual_ties", {}),
    "continual_ties 0.7": ("continual_ties", {"density": 0.7, "scale": 1.0}),
    "continual_ties whole": ("continual_ties", {"density": 1.0}),
}


def oracle(case: str, base: Tensors, experts: Sequence[Tensors]) -> dict[str, Tensor]:
    """The merged task vector of a case."""
    name, params = CASES[case]
    merged: dict[str, Tensor] = getattr(order, name)(base, experts, **params)
    return merged


def twelve(dtype: torch.dtype) -> tuple[Tensors, Sequence[Tensors]]:
    """A base and twelve experts, all of this dtype."""
    base, experts = stream(12)
    lowered = [{name: tensor.to(dtype) for name, tensor in weights.items()} for weights in (base, *experts)]
    return lowered[0], lowered[1:]


def deployed(method: Method, state: Tensors, totals: Totals) -> dict[str, Tensor]:
    """The merged task vector before it is added to the base and rounded: what is read out over a base of zeros."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        slot, name = key.split("/")
        parts.setdefault(name, {})[slot] = tensor
    merged = {}
    for name, slots in parts.items():
        zeros = torch.zeros_like(next(iter(slots.values())))
        spec = TensorSpec(name, tuple(zeros.shape), torch.float32)
        merged[name] = method.read(zeros, slots, totals, spec).double()
    return merged


def gap(ours: Tensors, theirs: Tensors) -> float:
    """||ours - theirs|| / ||theirs|| over all tensors taken as one vector."""
    assert ours.keys() == theirs.keys()
    return rules.norm({name: ours[name] - theirs[name] for name in ours}) / rules.norm(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_twelve_arrivals_match_the_oracle(case: str, dtype: torch.dtype) -> None:
    method = make(*CASES[case])
    base, experts = twelve(dtype)
    weights, state, totals = merge(method, base, experts)
    ours, truth = deployed(method, state, totals), oracle(case, base, experts)
    error = gap(ours, truth)
    print(f"{case} {dtype}: {error:.1e}")
    assert error <= 1e-5
    for name in ours:
        if truth[name].numel():
            assert gap({name: ours[name]}, {name: truth[name]}) <= 1e-5, name
    for name, tensor in weights.items():
        whole = base[name].double() + truth[name]
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.double(), whole, rtol=torch.finfo(dtype).eps, atol=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_the_experts_matters(case: str) -> None:
    """Otherwise the oracles would not tell one order from another. Magmax needs equal magnitudes for that."""
    base, experts = twelve(torch.bfloat16)
    assert gap(oracle(case, base, experts), oracle(case, base, experts[::-1])) > 1e-3
    assert not make(*CASES[case]).order_independent


def fold(method: Method, deltas: list[list[list[float]]], base: list[list[float]]) -> list[list[float]]:
    """The merged matrix after these task vectors."""
    theta_0 = torch.tensor(base)
    spec = TensorSpec("w", tuple(theta_0.shape), torch.float32)
    state: State = {key: torch.zeros(slot.shape) for key, slot in method.slots(spec).items()}
    totals = Totals()
    for t, delta in enumerate(deltas, start=1):
        expert, tau = Contribution(t), torch.tensor(delta)
        for _ in range(method.rounds):
            expert = replace(expert, surveys=(*expert.surveys, method.survey(state, tau, spec, expert)))
        state, sums = method.update({**state, "base": theta_0}, tau, spec, expert)
        totals = method.tally(totals, sums, expert)
    merged: list[list[float]] = method.read(theta_0, state, totals, spec).tolist()
    return merged


@pytest.mark.parametrize(
    ("scheme", "value"),
    [
        ("linear", (1 * 1 + 2 * 2 + 3 * 6) / 6),
        ("sqrt", (1 * 1 + 2**0.5 * 2 + 3**0.5 * 6) / (1 + 2**0.5 + 3**0.5)),
        ("log", (math.log(2) * 1 + math.log(3) * 2 + math.log(4) * 6) / math.log(24)),
        ("quadratic", (1 * 1 + 4 * 2 + 9 * 6) / 14),
        ("cubic", (1 * 1 + 8 * 2 + 27 * 6) / 36),
        ("exp", (2 * 1 + 4 * 2 + 8 * 6) / 14),
        ("reverse_linear", (3 * 1 + 2 * 2 + 1 * 6) / 6),
        ("reverse_quadratic", (9 * 1 + 4 * 2 + 1 * 6) / 14),
        ("reverse_cubic", (27 * 1 + 8 * 2 + 1 * 6) / 36),
    ],
)
def test_recency_by_hand(scheme: str, value: float) -> None:
    assert fold(Recency(scheme=scheme), [[[1.0]], [[2.0]], [[6.0]]], [[0.0]])[0][0] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_long_line_keeps_its_digits(scheme: str) -> None:
    method, spec, count = Recency(scheme=scheme), TensorSpec("w", (50,), torch.float32), 2000
    taus = torch.randn(count, 50, generator=torch.Generator().manual_seed(3))
    state: State = {key: torch.zeros(slot.shape) for key, slot in method.slots(spec).items()}
    for t, tau in enumerate(taus, start=1):
        state, _ = method.update(state, tau, spec, Contribution(t))
    ours = method.read(torch.zeros(50), state, Totals(count), spec).double()
    if scheme == "exp":  # 2^2000 is no float; what is 64 experts old carries nothing
        f = torch.tensor([2.0 ** max(i - count, -64) for i in range(1, count + 1)], dtype=torch.float64)
    else:
        f = torch.tensor(order.recency_weights(scheme, count), dtype=torch.float64)
    truth = (f[:, None] * taus.double()).sum(0) / f.sum()
    assert gap({"w": ours}, {"w": truth}) <= 1e-5


def test_exp_goes_half_way_to_the_ten_thousandth_expert() -> None:
    state, _ = Recency(scheme="exp").update(
        {"A": torch.zeros(1)}, torch.ones(1), TensorSpec("w", (1,), torch.float32), Contribution(10_000)
    )
    assert state["A"].item() == 0.5


@pytest.mark.parametrize(("scheme", "sums"), [("cubic", 1), ("reverse_linear", 2), ("reverse_cubic", 4)])
def test_recency_keeps_what_its_scheme_needs(scheme: str, sums: int) -> None:
    assert len(Recency(scheme=scheme).slots(TensorSpec("w", (2,), torch.float32))) == sums


@pytest.mark.parametrize("scheme", ["reverse_sqrt", "reverse_log"])
def test_a_scheme_that_no_fixed_state_follows_is_refused(scheme: str) -> None:
    with pytest.raises(BadParameter, match=f"{scheme}.*no fixed number of sums") as refused:
        make("recency", {"scheme": scheme})
    assert refused.value.reason == Reason.BAD_PARAMETER
    assert "reverse_linear" in refused.value.hint
    with pytest.raises(BadParameter, match="cannot be 'reverse_exp'"):
        make("recency", {"scheme": "reverse_exp"})


def test_two_experts_give_plain_slerp_of_their_weights() -> None:
    base, experts = stream(2)
    weights, _, _ = merge(make("slerp"), base, experts)
    turned = 0
    for name, tensor in base.items():
        a, b = (expert[name].double() for expert in experts)
        plain, straight = order.slerped(a, b, 0.5, 0.9995), (a + b) / 2
        turned += not torch.allclose(plain, straight, rtol=1e-4)
        assert torch.allclose(weights[name].double(), plain, rtol=1e-6, atol=1e-6), tensor.shape
    assert turned >= 5


def test_slerp_by_hand() -> None:
    half = math.sqrt(0.5)
    right, up, back = [[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]
    slerp = make("slerp")
    assert fold(slerp, [right], [[0.0, 0.0]]) == right
    assert fold(slerp, [right, up], [[0.0, 0.0]])[0] == pytest.approx([half, half])
    # at 45 degrees, then a third of the way to 180 degrees
    assert fold(slerp, [right, up, back], [[0.0, 0.0]])[0] == pytest.approx([0.0, 1.0], abs=1e-6)
    # the base counts: from (1, 1) both task vectors lead to the two axes
    assert fold(slerp, [[[0.0, -1.0]], [[-1.0, 0.0]]], [[1.0, 1.0]])[0] == pytest.approx([half, half])
    # lengths are interpolated along with the arc
    assert fold(slerp, [[[2.0, 0.0]], up], [[0.0, 0.0]])[0] == pytest.approx([2 * half, half])


@pytest.mark.parametrize(
    ("deltas", "middle"),
    [
        ([[[1.0, 0.0]], [[-3.0, 0.0]]], [-1.0, 0.0]),  # opposed
        ([[[1.0, 0.0]], [[3.0, 0.01]]], [2.0, 0.005]),  # nearly parallel
        ([[[0.0, 0.0]], [[0.0, 4.0]]], [0.0, 2.0]),  # one of them zero
    ],
)
def test_slerp_goes_straight_where_there_is_no_arc(deltas: list[list[list[float]]], middle: list[float]) -> None:
    assert fold(make("slerp"), deltas, [[0.0, 0.0]])[0] == pytest.approx(middle)


def test_slerp_averages_scalars() -> None:
    base, experts = stream(12)
    weights, _, _ = merge(make("slerp"), base, experts)
    truth = rules.mean(base, experts)
    assert torch.allclose(weights["scalar"].double(), truth["scalar"], atol=1e-6)


def test_magmax_by_hand() -> None:
    deltas = [[[4.0, -1.0, 2.0]], [[-6.0, 0.5, -2.0]], [[5.0, 1.0, 1.0]]]
    assert fold(make("magmax"), deltas, [[10.0, 10.0, 10.0]]) == [[7.0, 10.5, 9.0]]
    assert fold(make("magmax", {"scale": 2}), deltas[::-1], [[0.0, 0.0, 0.0]]) == [[-12.0, -2.0, 4.0]]


def test_continual_ties_by_hand() -> None:
    zeros = [[0.0] * 5]
    first, second = [[5.0, -4.0, 3.0, 1.0, 0.5]], [[-4.0, -6.0, 5.0, 0.5, 2.0]]
    # density 0.4 keeps three values: 5 -4 3 | -4 -6 5
    ties = make("continual_ties", {"density": 0.4, "scale": 0.5})
    assert fold(ties, [first], zeros) == [[2.5, -2.0, 1.5, 0.0, 0.0]]
    # signs of 1, -10, 8: 5 alone, the mean of -4 and -6, the mean of 3 and 5
    assert fold(ties, [first, second], zeros) == [[2.5, -2.5, 2.0, 0.0, 0.0]]
    # A is 5 -5 4, tau keeps 1 9 -7: signs of 6, 4, -3
    assert fold(ties, [first, second, [[1.0, 9.0, -7.0, 0.5, 0.25]]], zeros) == [[1.5, 4.5, -3.5, 0.0, 0.0]]


@pytest.mark.parametrize(("tail", "winner"), [(1.0, 3.0), (-1.0, -3.0)])
def test_where_two_values_cancel_out_the_majority_of_the_model_decides(tail: float, winner: float) -> None:
    """The majority is that of the whole model, here in other tensors than the one in question."""
    base = {"a": torch.zeros(1), "b": torch.zeros(2, 2)}
    experts = [{"a": torch.tensor([sign * 3.0]), "b": torch.full((2, 2), tail)} for sign in (1, -1)]
    weights, _, _ = merge(make("continual_ties", {"density": 1.0, "scale": 1.0}), base, experts)
    assert weights["a"].tolist() == [winner]
    assert weights["b"].tolist() == [[tail, tail], [tail, tail]]


def test_where_even_the_majority_is_undecided_minus_wins() -> None:
    ties = make("continual_ties", {"density": 1.0, "scale": 1.0})
    assert fold(ties, [[[3.0, -2.0]], [[-3.0, 2.0]]], [[0.0, 0.0]]) == [[-3.0, -2.0]]


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_two_experts_give_plain_ties(density: float) -> None:
    base, experts = twelve(torch.bfloat16)
    ours, theirs = (
        merge(make(name, {"density": density, "scale": 1.0}), base, experts[:2])[0]
        for name in ("continual_ties", "ties")
    )
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
