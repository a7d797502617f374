"""The k-th largest magnitude from two sweeps, against a sort of the whole vector."""

from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from projector.algebra import selection
from projector.algebra.selection import (
    COARSE_BINS,
    FINE_BINS,
    coarse,
    fine,
    just_below,
    kept,
    kth_largest,
    survey,
    surveyed,
    threshold,
    upper_bits,
)
from projector.laws.trial import merge
from projector.methods import make

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def in_two_sweeps(blocks: list[Tensor], k: int) -> float:
    first = sum((coarse(block) for block in blocks), torch.zeros(COARSE_BINS, dtype=torch.int64))
    upper = upper_bits(first, k)
    second = sum((fine(block, upper) for block in blocks), torch.zeros(FINE_BINS, dtype=torch.int64))
    return threshold(first, second, k)


@given(st.lists(FLOATS, min_size=1, max_size=40), st.data())
def test_every_rank_is_found_among_any_floats(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    x = torch.tensor(values, dtype=torch.float32)
    assert in_two_sweeps([x[:cut], x[cut:]], k) == x.abs().sort(descending=True).values[k - 1].item()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_rank_is_found_where_values_share_their_upper_bits_or_are_equal(dtype: torch.dtype, scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    near = (scale * (1 + 1e-3 * torch.randn(300, 7, generator=draw))).to(dtype).float()
    x = torch.cat([near, -near[:50], torch.zeros(20, 7)])
    ordered = x.abs().flatten().sort(descending=True).values
    for k in (1, 2, 350, 1000, 2100, x.numel() - 140, x.numel()):
        assert kth_largest(x, k) == [ordered[k - 1].item()], k
        assert in_two_sweeps([*x.split(13)], k) == ordered[k - 1].item(), k


def test_a_vector_longer_than_a_piece_is_counted_whole() -> None:
    x = torch.randn(700, 1001, generator=torch.Generator().manual_seed(0))
    assert int(coarse(x).sum()) == x.numel()
    ordered = x.abs().flatten().sort(descending=True).values
    assert kth_largest(x, 140_000, 3) == [ordered[139_999].item(), ordered[2].item()]
    assert kth_largest(x.T, 140_000) == [ordered[139_999].item()]


def test_a_share_keeps_what_the_released_code_of_ties_keeps() -> None:
    """The magnitudes that are not below the (count - k)-th smallest, k = int(density * count); all of them at 1."""
    x = torch.randn(57, generator=torch.Generator().manual_seed(0))
    for density in (0.0, 0.01, 0.2, 0.5, 0.99):
        k = int(len(x) * density)
        least = x.abs().kthvalue(len(x) - k).values
        assert kept(density, len(x)) == int((x.abs() >= least).sum()) == k + 1
        assert kth_largest(x, kept(density, len(x))) == [least.item()]
    assert kept(1.0, 57) == 57
    assert kept(0.2, 1) == 1
    assert kept(0.2, 0) == 0


def test_the_survey_rounds_find_the_share_of_the_model() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = [10.0**-n * torch.randn(shape, generator=draw) for n, shape in enumerate([(90, 3), (), (0, 4), (40,)])]
    surveys: list[dict[str, Tensor]] = []
    for key in ("coarse", "fine"):
        shares = [survey(tensor, 0.3, surveys) for tensor in tensors]
        assert all(share.keys() == {key} and share[key].dtype == torch.int64 for share in shares)
        surveys.append({key: torch.stack([share[key] for share in shares]).sum(0)})
    ordered = torch.cat([tensor.flatten() for tensor in tensors]).abs().sort(descending=True).values
    assert surveyed(0.3, surveys) == ordered[int(0.3 * 311)].item()


@given(st.floats(0, width=32, allow_infinity=False))
def test_what_exceeds_the_float_before_a_magnitude_reaches_it(magnitude: float) -> None:
    before = just_below(magnitude)
    between = torch.tensor([before, magnitude])
    assert before < magnitude or before == magnitude == 0
    assert torch.nextafter(between[0], between[1]) == magnitude


def test_of_nothing_nothing_is_kept() -> None:
    nothing = torch.zeros(0, 4)
    assert int(coarse(nothing).sum()) == 0
    assert kth_largest(nothing, kept(0.5, 0)) == [inf]


@pytest.mark.parametrize("numel", [0, 1, 64, selection.FEW, selection.FEW + 1])
def test_few_values_are_counted_without_the_bins_of_many(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    upper = upper_bits(coarse(x), max(1, numel // 2)) if numel else 7
    found = coarse(x), fine(x, upper), kth_largest(x, *range(min(numel, 9) + 1))
    if numel <= selection.FEW:
        assert all(counts.is_sparse and len(counts.values()) <= numel for counts in found[:2])
    monkeypatch.setattr(selection, "FEW", -1)
    assert torch.equal(found[0].to_dense(), coarse(x)) and torch.equal(found[1].to_dense(), fine(x, upper))
    assert found[2] == kth_largest(x, *range(min(numel, 9) + 1))


@pytest.mark.parametrize("method", ["ties", "continual_ties", "pcb"])
def test_a_model_of_small_tensors_beside_a_large_one_is_surveyed_as_with_all_bins(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"large": (60, 50), "bias": (64,), "norm": (7,), "none": (0, 3), "one": ()}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    expert = {name: x + torch.randn(x.shape, generator=draw) for name, x in base.items()}
    merged, _, _ = merge(make(method, {}), base, [expert, base, expert])
    monkeypatch.setattr(selection, "FEW", -1)
    dense, _, _ = merge(make(method, {}), base, [expert, base, expert])
    assert all(torch.equal(merged[name], dense[name]) for name in shapes)
