"""Held against the full singular value decomposition in float64 (Eckart and Young)."""

from math import sqrt

import pytest
import torch
from torch import Tensor

from projector.algebra.low_rank import LowRank, low_rank

SHAPES = [(40, 24), (24, 40), (32, 32), (1, 20), (20, 1), (1, 1), (700, 3)]


def drawn(m: int, n: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall, as those of task vectors do."""
    draw = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left_MK = torch.randn(m, k, generator=draw, dtype=torch.float64)
    right_KN = torch.randn(k, n, generator=draw, dtype=torch.float64)
    return (left_MK * 0.8 ** torch.arange(k, dtype=torch.float64)) @ right_KN


def nearest(d_MN: Tensor, rank: int) -> tuple[Tensor, float]:
    """The best approximation and its squared norm, from the definition."""
    u_MK, s_K, v_KN = torch.linalg.svd(d_MN.double(), full_matrices=False)
    return (u_MK[:, :rank] * s_K[:rank]) @ v_KN[:rank], float(s_K[:rank].square().sum())


def product(found: LowRank) -> Tensor:
    return found.up.double() @ found.down.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 1000])
def test_it_is_the_nearest_matrix_of_that_rank(shape: tuple[int, int], rank: int) -> None:
    d_MN = drawn(*shape).float()
    found = low_rank(d_MN, rank)
    wanted, kept = nearest(d_MN, rank)
    assert found.rank == min(rank, *shape)
    assert (found.up.shape, found.down.shape) == ((shape[0], found.rank), (found.rank, shape[1]))
    assert found.up.dtype == found.down.dtype == torch.float32
    assert found.up.is_contiguous() and found.down.is_contiguous()
    torch.testing.assert_close(product(found), wanted, rtol=0, atol=3e-7 * float(d_MN.norm()))
    assert found.kept == pytest.approx(kept, rel=1e-12)
    assert found.total == pytest.approx(float(d_MN.double().square().sum()), rel=1e-12)
    assert found.kept <= found.total


def test_both_factors_have_the_same_norm() -> None:
    found = low_rank(drawn(40, 24), 8)
    assert float(found.up.norm()) == pytest.approx(float(found.down.norm()), rel=1e-6)
    assert float(found.up.norm()) ** 2 == pytest.approx(float(torch.linalg.svdvals(drawn(40, 24))[:8].sum()), rel=1e-6)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=str)
def test_a_matrix_of_lower_rank_gets_no_more_than_it_has(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(3)
    left, right = torch.randn(shape[0], 5, generator=draw).double(), torch.randn(5, shape[1], generator=draw).double()
    found = low_rank(left @ right, 12)
    assert found.rank == 5
    assert found.kept == pytest.approx(found.total, rel=1e-12)
    torch.testing.assert_close(product(found), left @ right, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (0, 4), (4, 0)], ids=str)
def test_a_zero_or_empty_matrix_has_rank_0(shape: tuple[int, int]) -> None:
    found = low_rank(torch.zeros(shape), 3)
    assert (found.rank, found.kept, found.total) == (0, 0.0, 0.0)
    assert torch.equal(found.up @ found.down, torch.zeros(shape))


def test_equal_singular_values_are_no_obstacle() -> None:
    """Which vectors stand for them is free; what is kept is not."""
    found = low_rank(torch.eye(12), 5)
    assert found.kept == pytest.approx(5) and found.total == pytest.approx(12)
    assert float((product(found) - torch.eye(12).double()).norm()) == pytest.approx(sqrt(7))


def test_the_signs_are_fixed() -> None:
    for shape in [(40, 24), (24, 40)]:
        found, turned = low_rank(drawn(*shape), 6), low_rank(-drawn(*shape), 6)
        chosen_RN, free_RN = (found.down, turned.down) if shape[0] >= shape[1] else (found.up.T, turned.up.T)
        assert (chosen_RN.gather(1, chosen_RN.abs().argmax(1, keepdim=True)) > 0).all()
        assert torch.equal(chosen_RN, free_RN)  # the sign of the matrix goes to the other factor alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_each_time_and_the_argument_stays(dtype: torch.dtype) -> None:
    d_MN = drawn(40, 24).to(dtype)
    before = d_MN.clone()
    first, second = low_rank(d_MN, 6), low_rank(d_MN.T.contiguous().T, 6)
    assert torch.equal(first.up, second.up) and torch.equal(first.down, second.down)
    assert torch.equal(d_MN, before)


def test_tiny_and_huge_matrices_keep_their_scale() -> None:
    for scale in (1e-18, 1e18):
        found = low_rank((drawn(20, 10) * scale).float(), 10)
        torch.testing.assert_close(product(found) / scale, drawn(20, 10), rtol=0, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_a_device_gives_the_same(shape: tuple[int, int]) -> None:
    here, there = low_rank(drawn(*shape), 6), low_rank(drawn(*shape).cuda(), 6)
    torch.testing.assert_close(there.up.cpu(), here.up, rtol=0, atol=1e-5)
    torch.testing.assert_close(there.down.cpu(), here.down, rtol=0, atol=1e-5)
    assert there.kept == pytest.approx(here.kept, rel=1e-9)
