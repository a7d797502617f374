"""Thin decompositions, whole and by way of a sketch, against LAPACK's in float64; and what each costs, in flops."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from projector.algebra.svd import thin_svd

pytestmark = pytest.mark.usefixtures("one_thread")

TOL = 1e-6


def drawn(m: int, n: int, rank: int, *, decay: float = 1.0, seed: int = 0) -> Tensor:
    """U diag(s) V' in float64, s from 1 down to `decay`."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64)).Q for side in (m, n))
    return u * torch.logspace(0, torch.tensor(decay).log10(), rank, dtype=torch.float64) @ v.T


def flops(d: Tensor) -> int:
    """What thin_svd multiplies; an eigensolver's work is not counted."""
    with FlopCounterMode(display=False) as counter:
        thin_svd(d, TOL)
    return counter.get_total_flops()


def assert_right(d: Tensor, tolerance: float) -> None:
    left, right, s = thin_svd(d, TOL)
    u, wanted, vh = torch.linalg.svd(d.double(), full_matrices=False)
    wanted = wanted * (wanted > TOL * wanted[0])
    rank = int(wanted.count_nonzero())
    assert left.dtype == right.dtype == d.dtype and s.dtype == torch.float64
    assert (left.shape, right.shape, s.shape) == (u.shape, vh.T.shape, wanted.shape)
    assert torch.allclose(s, wanted, rtol=tolerance, atol=0)
    assert not left[:, rank:].any() and not right[:, rank:].any()
    for ours, theirs in ((left, u), (right, vh.T)):
        turned = (ours[:, :rank].double() * theirs[:, :rank]).sum(0).abs()
        assert (1 - turned).max() <= tolerance


@pytest.mark.parametrize("shape", [(160, 160), (400, 160), (160, 400)], ids=str)
@pytest.mark.parametrize("rank", [1, 6, 12, 13, 40, 160])
@pytest.mark.parametrize("decay", [0.3, 1e-3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)], ids=str)
def test_the_vectors_and_values_are_lapacks(
    shape: tuple[int, int], rank: int, decay: float, dtype: torch.dtype, tolerance: float
) -> None:
    assert_right(drawn(*shape, rank, decay=decay if rank > 1 else 1.0).to(dtype), tolerance)


def test_what_is_above_the_tolerance_is_never_left_out() -> None:
    """A rank that is low but for directions which a small piece of the matrix hardly shows."""
    faint = torch.zeros(160, 160, dtype=torch.float64)
    for i, size in enumerate((1e-1, 1e-4, 3e-6), start=1):
        faint[-i, -i] = size  # in no row or column of the piece
    assert_right(drawn(160, 160, 3, decay=0.5) + faint, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_wide_tolerance_turns_no_direction_that_is_kept(dtype: torch.dtype) -> None:
    """Twenty directions of a fifth of the tolerance, in rows that the small piece skips: more than the sketch of the
    three that it shows has room for."""
    hidden = torch.zeros(160, 160, dtype=torch.float64)
    hidden[1::8] = drawn(20, 160, 20, decay=0.9, seed=1) * 2e-3
    d = (drawn(160, 160, 3, decay=0.5) + hidden).to(dtype)
    left, _, s = thin_svd(d, 1e-2)
    u, wanted, _ = torch.linalg.svd(d.double())
    assert s.count_nonzero() == int((wanted > 1e-2 * wanted[0]).sum()) == 3
    assert torch.allclose(s[:3], wanted[:3], rtol=1e-6)
    assert ((left[:, :3].double() * u[:, :3]).sum(0).abs() - 1).abs().max() <= 1e-6


def test_directions_that_carry_come_first_however_small_the_tolerance() -> None:
    left, right, s = thin_svd(drawn(60, 40, 40, decay=1e-12), 1e-9)
    carried = int(s.count_nonzero())
    assert 0 < carried < 40 and (s[:carried] > 0).all()
    assert left[:, :carried].any(0).all() and not left[:, carried:].any() and not right[:, carried:].any()


def test_the_sum_of_many_adapters_in_float32_is_still_seen_as_of_low_rank() -> None:
    """Rounded after every one of eight."""
    total = torch.zeros(800, 640)
    for seed in range(8):
        total += drawn(800, 640, 8, decay=0.5, seed=seed).float()
    assert flops(total) <= flops(drawn(800, 640, 640, decay=0.5).float()) / 2
    assert_right(total, 1e-4)


def test_without_a_tolerance_nothing_is_left_out() -> None:
    d = drawn(160, 160, 3, decay=0.5)
    left, right, s = thin_svd(d, 0.0)
    assert s.count_nonzero() > 100  # rounding's directions, too
    assert torch.allclose(left * s @ right.T, d, rtol=0, atol=1e-14)


def test_a_low_rank_costs_what_its_directions_cost() -> None:
    whole, low = flops(drawn(800, 800, 800, decay=0.5)), flops(drawn(800, 800, 16, decay=0.5))
    assert low <= whole / 8
    assert flops(torch.zeros(800, 800)) <= whole / 8


def test_a_high_rank_is_seen_before_it_is_sketched() -> None:
    """The products of the dense way and no others: D V, its improvement, V E. (Sums in place are not counted.)"""
    n = 800
    assert flops(drawn(n, n, n, decay=0.5)) == 3 * 2 * n**3


def test_the_same_matrix_gives_the_same_bits() -> None:
    d = drawn(400, 160, 5, decay=0.1).float()
    assert all(torch.equal(a, b) for a, b in zip(thin_svd(d, TOL), thin_svd(d.clone(), TOL), strict=True))
