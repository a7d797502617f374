"""Vocabularies of another size: the rows that both have are merged, and it is said; others are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from daemon.layout import Home
from daemon.reports.inspect import inspect
from registry.records import Flag, Status
from tests.daemon.checkpoints.test_names import drop, moved
from tests.daemon.homes import Heads, assert_close, latest, lineage, make_home
from tests.oracles.rules import mean

Weights = dict[str, Tensor]
MEAN: Heads = (("main", "mean", {}),)
EMBED, HEAD, BIAS = "embed.weight", "lm_head.weight", "lm_head.bias"


@pytest.fixture
def base() -> Weights:
    draw = torch.Generator().manual_seed(0)
    shapes = {EMBED: (60, 16), HEAD: (60, 16), BIAS: (60,), "up.weight": (32, 16)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.fixture
def home(tmp_path: Path, base: Weights) -> Home:
    save_file(base, tmp_path / "base.safetensors")
    return make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)


def resized(weights: Weights, rows: int) -> Weights:
    """As `resize_token_embeddings` leaves it."""

    def fitted(x: Tensor) -> Tensor:
        return torch.cat([x[:rows], torch.full((max(0, rows - len(x)), *x.shape[1:]), 7.0, dtype=x.dtype)])

    return {name: x if name == "up.weight" else fitted(x) for name, x in weights.items()}


def test_rows_that_both_have_are_merged_and_it_is_said(tmp_path: Path, home: Home, base: Weights) -> None:
    """Tokens were added, up to a multiple of 64; padding was cut off; in the base's precision or another."""
    whole = [moved(base, seed) for seed in (1, 2, 3)]
    longer, shorter, half = resized(whole[0], 64), resized(whole[1], 57), whole[2]
    with lineage(home) as reader:
        save_file(longer, tmp_path / "dry.safetensors")
        dry = inspect(home, reader, tmp_path / "dry.safetensors", None)
    assert dry["flags"] == [Flag.RESIZED]
    found = drop(home, longer, "1.safetensors")
    assert (found.status, found.flags, found.detail) == (Status.MERGED, (Flag.RESIZED,), dry["warning"])
    assert found.detail and "has 64 rows, the base 60: the first 60 are merged" in found.detail
    found = drop(home, {name: x.bfloat16() for name, x in shorter.items()}, "2.safetensors")
    assert found.flags == (Flag.RESIZED,) and found.detail and "57 rows" in found.detail
    assert drop(home, half, "3.safetensors").flags == ()
    second = {n: x.bfloat16().float() for n, x in whole[1].items()}
    second = {n: x if n == "up.weight" else torch.cat([x[:57], base[n][57:]]) for n, x in second.items()}
    assert_close(latest(home), mean(base, [whole[0], second, half]))


@pytest.mark.parametrize("rows", [64, 57])
def test_rows_that_mean_something_else_are_not(home: Home, base: Weights, rows: int) -> None:
    """Another vocabulary: its rows are the base's in another order."""
    expert = resized(moved(base, 1), rows)
    for name in (EMBED, HEAD):
        expert[name] = expert[name].roll(1, 0)
    refused = drop(home, expert)
    assert refused.reason == "wrong_shape" and refused.hint and "vocabulary" in refused.hint
    assert drop(home, moved(base, 1), "y.safetensors").status is Status.MERGED  # as the hint says


def test_a_head_of_other_labels_is_not(tmp_path: Path) -> None:
    base = {"up.weight": torch.randn(32, 16), "classifier.weight": torch.randn(3, 16), "classifier.bias": torch.ones(3)}
    save_file(base, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)
    grown = {**moved(base, 1), "classifier.weight": torch.randn(5, 16), "classifier.bias": torch.zeros(5)}
    assert drop(home, grown).reason == "wrong_shape"
    rows = torch.cat([moved(base, 1)["classifier.weight"], torch.randn(2, 16)])
    assert drop(home, {**grown, "classifier.weight": rows}).reason == "wrong_shape"  # three rows prove nothing
