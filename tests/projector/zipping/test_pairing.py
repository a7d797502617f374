"""Which features become one, against the paper's rule written out; and their correlations from batches."""

import pytest
import torch
from torch import Tensor

from projector.errors import BadParameter, BadValues
from projector.zipping.moments import FEWEST_ROWS, Moments
from projector.zipping.pairing import Pairing, pair
from tests.oracles.zipit import correlations, matched

SETTINGS = [(0, 1), (0, 0.5), (0, 0), (0.3, 0.25), (0.5, 1), (1, 1), (1, 0), (0.1, 0.5)]


def features(rows: int, count: int, seed: int) -> Tensor:
    """(rows, count), correlated with each other."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, count, generator=draw, dtype=torch.float64)
    return torch.randn(rows, count, generator=draw, dtype=torch.float64) @ mixed + 100


def matrices(found: Pairing) -> tuple[Tensor, Tensor]:
    """M (n, 2n) and U (2n, n): what merging and unmerging the identity gives."""
    eye = torch.eye(found.size, dtype=torch.float64)
    merge = torch.cat([found.merge(eye, 0, model) for model in range(2)], dim=1)
    return merge, torch.cat([found.unmerge(eye, 1, model) for model in range(2)])


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_it_is_the_papers_rule(n: int, alpha: float, beta: float) -> None:
    for seed, weights in enumerate([(0.5, 0.5), (0.75, 0.25)]):
        rows = features(120, 2 * n, seed=n + seed)
        like = torch.tensor(correlations(rows.numpy()))
        merge, unmerge = matrices(pair(like, weights, alpha, beta))
        right = matched(like.numpy(), weights, alpha, beta)
        assert torch.equal(unmerge, torch.tensor(right[1]))
        torch.testing.assert_close(merge, torch.tensor(right[0]), rtol=0, atol=1e-15)


def test_correlations_come_out_of_batches_as_of_all_at_once() -> None:
    rows = features(400, 12, seed=1)
    rows[:, 3] = 7.0
    moments = Moments()
    for start in range(0, 400, 33):
        moments.add(list(rows[start : start + 33].split(6, dim=1)))
    moments.add(list(rows[:0].split(6, dim=1)))
    right = torch.tensor(correlations(rows.numpy()))
    torch.testing.assert_close(moments.correlation(), right, rtol=0, atol=1e-12)
    assert moments.rows == 400 and moments.dead().tolist() == [number == 3 for number in range(12)]


def test_a_permuted_copy_finds_itself() -> None:
    rows = features(200, 20, seed=2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    moments = Moments()
    moments.add([rows, rows[:, order]])
    found = pair(moments.correlation())
    assert found.groups.tolist() == [list(range(20)), order.tolist()]
    assert found.counted() == {"across": 20, "within": 0, "alone": 0} and found.merit == pytest.approx(1)


def test_the_budget_bounds_what_comes_together_within_a_model() -> None:
    half = features(300, 8, seed=4)
    noisy = half + 1e-3 * torch.randn(half.shape, dtype=torch.float64)
    moments = Moments()
    moments.add(
        [torch.cat([half, noisy], 1), features(300, 16, seed=5)]
    )  # the first model has all of its features twice
    assert pair(moments.correlation(), beta=1).counted() == {"across": 0, "within": 16, "alone": 0}
    assert pair(moments.correlation(), beta=0.5).counted() == {"across": 8, "within": 8, "alone": 0}
    assert pair(moments.correlation(), beta=0).counted() == {"across": 16, "within": 0, "alone": 0}


def test_what_no_correlation_can_be_told_of_is_refused() -> None:
    moments = Moments()
    rows = features(FEWEST_ROWS - 1, 4, seed=6)
    moments.add(list(rows.split(2, dim=1)))
    with pytest.raises(BadValues, match=f"gave {FEWEST_ROWS - 1} rows"):
        moments.correlation()
    moments.add(list(rows.split(2, dim=1)))
    assert moments.correlation().isfinite().all()
    rows[3, 3] = torch.nan
    with pytest.raises(BadValues, match="feature 1 of model 2 is NaN"):
        moments.add(list(rows.split(2, dim=1)))


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 1), (1.1, 1), (0, 2), (float("nan"), 1)])
def test_what_is_no_share_is_refused(alpha: float, beta: float) -> None:
    with pytest.raises(BadParameter):
        pair(torch.eye(4, dtype=torch.float64), alpha=alpha, beta=beta)
