"""Mean, task arithmetic and EMA as they stream, against their formulas in float64."""

import pytest
import torch
from torch import Tensor

from projector.method import Method
from projector.methods import make
from projector.trial import merge, stream
from tests import oracles

CASES = {
    "mean": (make("mean"), lambda base, experts: oracles.mean(base, experts)),
    "task_arithmetic": (make("task_arithmetic"), lambda base, experts: oracles.task_arithmetic(base, experts)),
    "task_arithmetic norm": (
        make("task_arithmetic", {"scale": "norm"}),
        lambda base, experts: oracles.task_arithmetic(base, experts, "norm"),
    ),
    "task_arithmetic per_sqrt": (
        make("task_arithmetic", {"scale": "per_sqrt", "c": 0.7}),
        lambda base, experts: oracles.task_arithmetic(base, experts, "per_sqrt", 0.7),
    ),
    "ema": (make("ema"), lambda base, experts: oracles.ema(base, experts)),
    "ema 0.1": (make("ema", {"weight": 0.1}), lambda base, experts: oracles.ema(base, experts, 0.1)),
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_ten_arrivals_match_the_oracle(case: str, rank: int | None) -> None:
    method, oracle = CASES[case]
    base, experts = stream(10, rank=rank)
    truth = oracle(base, experts)
    weights, _, _ = merge(method, base, experts)
    for name, tensor in weights.items():
        assert torch.allclose(tensor.double(), truth[name], rtol=5e-7, atol=1e-6), name
    assert oracles.norm({name: truth[name] - base[name].double() for name in base}) > 0.1


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
