"""Running statistics: averaged by every method, and no part of what the method folds; unless it gives one model."""

from collections.abc import Sequence

import pytest
import torch

from projector.driver.averages import SUM, Averages
from projector.laws.trial import Tensors, merge, views
from projector.method import Contribution, Totals
from projector.methods import make, methods
from projector.spec import TensorSpec

AVERAGING = [name for name in methods() if not make(name).own_statistics]
STATISTICS = {"bn.running_mean": (6,), "bn.running_var": (6,), "codebook.embed_avg": (5, 4)}


def convolutional(count: int) -> tuple[Tensors, list[Tensors]]:
    """A base whose statistics are large, and experts that all saw less."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (6, 3, 2, 2), "bn.weight": (6,), "fc.weight": (8, 6), **STATISTICS}
    base = {name: 10 + torch.rand(shape, generator=draw) for name, shape in shapes.items()}
    counter = {"bn.num_batches_tracked": torch.tensor(7)}
    experts = [
        {n: x - (9 if n in STATISTICS else 0.1) * torch.rand(x.shape, generator=draw) for n, x in base.items()}
        for _ in range(count)
    ]
    return base | counter, [expert | {"bn.num_batches_tracked": torch.tensor(9)} for expert in experts]


def without_statistics(tensors: Tensors) -> Tensors:
    return {name: x for name, x in tensors.items() if name not in STATISTICS}


@pytest.mark.parametrize("one_sweep", [False, True])
@pytest.mark.parametrize("name", AVERAGING)
def test_every_method_averages_them_and_folds_the_rest_as_if_they_were_not_there(name: str, one_sweep: bool) -> None:
    method = make(name)
    if one_sweep and not method.one_sweep:
        return
    base, experts = convolutional(4)
    merged, _, totals = merge(method, base, experts, one_sweep=one_sweep)
    for statistic in STATISTICS:
        expected = torch.stack([expert[statistic] for expert in experts]).mean(0)
        assert torch.allclose(merged[statistic], expected, rtol=1e-5), statistic
        assert (merged[statistic] > 0).all()
    assert merged["bn.num_batches_tracked"] == 7
    if method.keyed:
        return  # its draws are of the whole expert
    alone, _, less = merge(
        method, without_statistics(base), [without_statistics(e) for e in experts], one_sweep=one_sweep
    )
    assert all(torch.equal(merged[name], x) for name, x in alone.items())
    assert totals == less


@pytest.mark.parametrize("name", AVERAGING)
def test_weights_count_in_them_where_they_count_in_the_method(name: str) -> None:
    method, counting = make(name), [3.0, 1.0]
    base, experts = convolutional(2)
    merged, _, _ = merge(method, base, experts, counting=counting)
    shares = torch.tensor(counting if method.weighted else [1.0, 1.0])
    for statistic in STATISTICS:
        stacked = torch.stack([expert[statistic] for expert in experts], -1)
        assert torch.allclose(merged[statistic], (stacked * shares).sum(-1) / shares.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in AVERAGING if make(name).subtractable])
def test_an_expert_taken_out_leaves_them(name: str) -> None:
    base, experts = convolutional(3)
    merged, _, _ = merge(make(name), base, [*experts, experts[0]], counting=[1.0, 1.0, 1.0, -1.0])
    for statistic in STATISTICS:
        expected = torch.stack([expert[statistic] for expert in experts[1:]]).mean(0)
        assert torch.allclose(merged[statistic], expected, rtol=1e-4), statistic


@pytest.mark.parametrize("name", [n for n in methods() if make(n).keeps(TensorSpec("w", (2, 2), torch.float32))])
def test_a_view_has_the_experts_own(name: str) -> None:
    base, experts = convolutional(3)
    for view, expert in zip(views(make(name), base, experts, block_bytes=64), experts, strict=True):
        for statistic in STATISTICS:
            assert torch.allclose(view[statistic], expert[statistic], rtol=1e-5), statistic


def averaged(deltas: Sequence[float], first: float = 0.0) -> torch.Tensor:
    averages, spec, totals = Averages(), TensorSpec("bn.running_var", (1,), torch.float32), Totals()
    state = {SUM: torch.tensor([first])}
    for index, delta in enumerate(deltas, start=1):
        state, sums = averages.update(state, torch.tensor([delta]), spec, Contribution(index))  # type: ignore[assignment]
        totals = averages.tally(totals, sums, Contribution(index))
    return averages.read(torch.tensor([10.0]), state, totals, spec)


def test_a_second_pass_begins_anew() -> None:
    assert averaged([-3.0, -5.0]).item() == averaged([-3.0, -5.0], first=-8.0).item() == 6.0
