"""Latest and zero_shot: what they give is one model itself, bit for bit, its running statistics too."""

import pytest
import torch

from projector.laws.trial import Tensors, merge
from projector.methods import make, methods
from projector.spec import TensorSpec


def model(seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (40, 6), "bn.weight": (6,), "bn.running_var": (6,), "bn.running_mean": (6,)}
    weights = {name: (1 + torch.rand(shape, generator=draw)).bfloat16() for name, shape in shapes.items()}
    return weights | {"bn.num_batches_tracked": torch.tensor(seed)}


@pytest.mark.parametrize("one_sweep", [False, True])
@pytest.mark.parametrize(("name", "itself"), [("latest", -1), ("zero_shot", 0)])
def test_it_is_that_model(name: str, itself: int, one_sweep: bool) -> None:
    models = [model(seed) for seed in range(4)]
    merged, _, totals = merge(make(name), models[0], models[1:], one_sweep=one_sweep)
    expected = models[itself] | {"bn.num_batches_tracked": torch.tensor(0)}
    assert merged.keys() == expected.keys() and totals.experts == 3
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.items())


def test_no_other_method_takes_the_statistics_into_its_own_hands() -> None:
    assert [name for name in methods() if make(name).own_statistics] == ["latest", "zero_shot"]


def test_zero_shot_keeps_nothing() -> None:
    assert make("zero_shot").slots(TensorSpec("w", (3, 3), torch.float32)) == {}
