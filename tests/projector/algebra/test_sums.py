"""Mean, task arithmetic and EMA as they stream, against their formulas in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from projector.laws.trial import merge, stream
from projector.method import Method
from projector.methods import make
from tests.oracles import rules

CASES: dict[str, tuple[Method, Callable[..., dict[str, Tensor]]]] = {
    "mean": (make("mean"), rules.mean),
    "task_arithmetic": (make("task_arithmetic"), rules.task_arithmetic),
    "task_arithmetic norm": (
        make("task_arithmetic", {"scale": "norm"}),
        partial(rules.task_arithmetic, scale="norm"),
    ),
    "task_arithmetic per_sqrt": (
        make("task_arithmetic", {"scale": "per_sqrt", "c": 0.7}),
        partial(rules.task_arithmetic, scale="per_sqrt", coefficient=0.7),
    ),
    "ema": (make("ema"), rules.ema),
    "ema 0.1": (make("ema", {"weight": 0.1}), partial(rules.ema, weight=0.1)),
    "ema first": (make("ema", {"weight": 0.3, "start": "first"}), partial(rules.ema, weight=0.3, start="first")),
}
WEIGHTED = [case for case in CASES if "ema" not in case]
COUNTING = [0.3, 0.7, 2.0, 1.0, 0.001, 5.0, 1.1, 0.25, 1.0, 3.0, 0.9, 0.6]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_twelve_arrivals_match_the_oracle(case: str, rank: int | None) -> None:
    method, oracle = CASES[case]
    base, experts = stream(12, rank=rank)
    truth = oracle(base, experts)
    weights, _, _ = merge(method, base, experts)
    for name, tensor in weights.items():
        assert torch.allclose(tensor.double(), truth[name], rtol=5e-7, atol=1e-6), name
    assert rules.norm({name: truth[name] - base[name].double() for name in base}) > 0.1


@pytest.mark.parametrize("case", WEIGHTED)
def test_twelve_weighted_arrivals_match_the_oracle(case: str) -> None:
    method, oracle = CASES[case]
    base, experts = stream(12)
    truth = oracle(base, experts, weights=COUNTING)
    weights, _, totals = merge(method, base, experts, counting=COUNTING)
    for name, tensor in weights.items():
        assert torch.allclose(tensor.double(), truth[name], rtol=5e-7, atol=2e-6), name
    alike = oracle(base, experts)
    assert rules.norm({name: truth[name] - alike[name] for name in base}) > 0.1
    assert totals.weight == pytest.approx(sum(COUNTING))


@pytest.mark.parametrize("case", WEIGHTED)
def test_weighted_arrivals_can_be_taken_out(case: str) -> None:
    method, oracle = CASES[case]
    base, experts = stream(12)
    out = [0, 1, 5]
    left = [i for i in range(12) if i not in out]
    counting = [*COUNTING, *(-COUNTING[i] for i in out)]
    weights, _, totals = merge(method, base, [*experts, *(experts[i] for i in out)], counting=counting)
    truth = oracle(base, [experts[i] for i in left], weights=[COUNTING[i] for i in left])
    assert totals.experts == len(left)
    for name, tensor in weights.items():
        assert torch.allclose(tensor.double(), truth[name], rtol=5e-7, atol=2e-6), name


def test_experts_that_cancel_out_are_not_scaled_up() -> None:
    """What rounding leaves of their sum has a norm too, and the rule "norm" would raise it to theirs."""
    base = {"w": torch.zeros(2)}
    tau = torch.tensor([0.3, 0.4])
    experts = [{"w": tau}, {"w": 5 * tau.flip(0)}, {"w": -tau}, {"w": 5 * tau.flip(0)}]
    method = make("task_arithmetic", {"scale": "norm"})
    weights, state, totals = merge(method, base, experts, counting=[0.3, 0.7, 0.3, -0.7])
    assert state["S/w"].any()
    assert totals.scalars["scale"] == 0.0
    assert torch.equal(weights["w"], base["w"])
    assert rules.task_arithmetic(base, [experts[0], experts[2]], "norm", weights=[0.3, 0.3])["w"].tolist() == [0, 0]


@pytest.mark.parametrize("case", WEIGHTED)
def test_with_every_expert_taken_out_the_base_is_left(case: str) -> None:
    base, experts = stream(3)
    weights, state, _ = merge(CASES[case][0], base, [*experts, *experts], counting=[0.3, 0.7, 1.1, -0.3, -0.7, -1.1])
    assert state["S/square.weight"].any()
    assert all(torch.equal(weights[name], base[name]) for name in base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_low_precision_base_is_rounded_once(case: str, dtype: torch.dtype) -> None:
    """The published weight is the nearest one of the base's dtype, give or take one ulp at a tie."""
    method, oracle = CASES[case]
    base, experts = stream(6)
    low = {name: tensor.to(dtype) for name, tensor in base.items()}
    weights, _, _ = merge(method, low, experts)
    truth = oracle(low, experts)
    for name, tensor in weights.items():
        assert tensor.dtype == dtype
        exact = (tensor == truth[name].to(dtype)).double()
        assert exact.numel() == 0 or exact.mean() >= 0.99, name


def test_buffers_come_from_the_base() -> None:
    base: dict[str, Tensor] = {"w": torch.randn(3, 3), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    for name in ("opcm", "mean", "ema", "task_arithmetic"):
        method: Method = make(name)
        weights, state, _ = merge(method, base, [{"w": base["w"] + 1}, {"w": base["w"] - 2}])
        assert torch.equal(weights["steps"], base["steps"])
        assert torch.equal(weights["mask"], base["mask"])
        assert all(key.endswith("/w") for key in state)
