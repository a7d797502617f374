"""Task vectors scaled by layer, under any method: against the method's oracle over experts that moved so much less."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from projector.driver.fold import Driver
from projector.errors import BadParameter
from projector.laws.checks import LAWS, Law
from projector.laws.trial import merge, views
from projector.methods import make, methods
from tests.oracles import rules, spectral, trim

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]
SHAPES = {
    "embed.weight": (30, 8),
    "h.0.attn.weight": (12, 8),
    "h.1.mlp.0.weight": (8, 20),
    "h.2.attn.weight": (9, 9),
    "h.4.attn.weight": (10, 14),
    "h.4.bias": (10,),
    "norm.running_var": (6,),
    "norm.weight": (6,),
}
ALPHA, BETA = 0.5, 0.75
SCALES = {name: ALPHA + BETA * {"0": 0.0, "1": 0.25, "2": 0.5, "4": 1.0}.get(name[2], 0.0) for name in SHAPES}
STATISTIC = "norm.running_var"
SCALES[STATISTIC] = 1.0
LAYERED = {"layer_alpha": ALPHA, "layer_beta": BETA}


def stream(count: int = 4) -> tuple[Tensors, list[Tensors]]:
    generator = torch.Generator().manual_seed(11)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return base, [
        {name: base[name] + 0.05 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def scaled(base: Tensors, expert: Tensors) -> Tensors:
    """The expert that moved so much less; float64."""
    return {name: base[name].double() + SCALES[name] * (expert[name].double() - base[name].double()) for name in base}


CASES: Mapping[str, tuple[dict[str, Any], Callable[..., Mapping[str, Tensor]], bool]] = {
    # parameters, the oracle, whether it gives the weights or the merged task vector
    "mean": ({}, rules.mean, True),
    "task_arithmetic": ({"scale": "norm"}, lambda b, e: rules.task_arithmetic(b, e, scale="norm"), True),
    "ema": ({}, rules.ema, True),
    "opcm": ({}, rules.opcm, True),
    "ties": ({}, lambda b, e: trim.ties(b, e, [1.0] * len(e)), False),
    "tsv_m": ({}, spectral.tsv_m, False),
    "ace": ({}, spectral.ace, False),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_merge_of_experts_that_moved_so_much_less(name: str) -> None:
    params, oracle, whole = CASES[name]
    base, experts = stream()
    start = {key: tensor.double() for key, tensor in base.items()}
    less = [scaled(base, expert) for expert in experts]
    for tensors in (start, *less):
        del tensors[STATISTIC]
    truth = oracle(start, less)
    truth = truth if whole else {key: start[key] + tau for key, tau in truth.items()}
    weights, _, _ = merge(make(name, {**params, **LAYERED}), base, experts)
    alike, _, _ = merge(make(name, params), base, experts)
    mean = torch.stack([expert[STATISTIC] for expert in experts]).mean(0)
    assert torch.allclose(weights[STATISTIC], mean, atol=1e-6), "which no scale applies to"
    for key in truth:
        assert torch.allclose(weights[key].double(), truth[key], rtol=1e-6, atol=2e-6), key
    assert not torch.allclose(weights["h.0.attn.weight"], alike["h.0.attn.weight"], atol=1e-3)


def test_the_rule_is_that_of_lines() -> None:
    """alpha + beta * layer / (layers - 1), by the numbers."""
    base = {f"layers.{i}.weight": torch.zeros(2, 2) for i in range(4)} | {"head.weight": torch.zeros(2)}
    expert = {name: torch.ones_like(tensor) for name, tensor in base.items()}
    weights, _, _ = merge(make("latest", {"layer_alpha": 0.25, "layer_beta": 0.5}), base, [expert])
    assert [float(weights[f"layers.{i}.weight"][0, 0]) for i in range(4)] == pytest.approx(
        [1 / 4, 5 / 12, 7 / 12, 3 / 4]
    )
    assert weights["head.weight"].tolist() == [0.25, 0.25]


def test_statistics_are_the_experts_own_where_a_method_takes_one_model() -> None:
    base, experts = stream(2)
    weights, _, _ = merge(make("latest", LAYERED), base, experts)
    assert torch.allclose(weights[STATISTIC], experts[1][STATISTIC], atol=1e-6)
    assert not torch.allclose(weights["norm.weight"], experts[1]["norm.weight"], atol=1e-3)


def test_blocks_of_rows_have_their_tensors_depth() -> None:
    base, experts = stream()
    method = make("ties", LAYERED)
    whole, split = (merge(method, base, experts, Driver(block_bytes=size))[0] for size in (1 << 20, 64))
    assert all(torch.allclose(tensor, split[name], rtol=1e-6, atol=1e-7) for name, tensor in whole.items())


def test_views_are_of_what_was_folded() -> None:
    base, experts = stream()
    ours = views(make("emr", LAYERED), base, experts)
    less = [{name: tensor.float() for name, tensor in scaled(base, expert).items()} for expert in experts]
    theirs = views(make("emr"), base, less)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.allclose(tensor, other[name], atol=2e-6) for name, tensor in one.items())


def test_a_second_pass_is_scaled_as_the_first() -> None:
    method = make("pcb", LAYERED)
    second = method.second_pass(3)
    assert second is not None and second.wants_depth
    assert second.params() == {**method.params(), "experts": 3}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", ["opcm", "emr"])
def test_the_laws_hold(name: str, law: Law) -> None:
    law(make(name, {"layer_alpha": 0.5, "layer_beta": 0.5}))


@pytest.mark.parametrize("name", methods())
def test_any_method_takes_it_and_only_where_it_is_given(name: str) -> None:
    plain, method = make(name), make(name, {"layer_alpha": "0.5", "layer_beta": "0.25"})
    assert not plain.wants_depth and "layer_alpha" not in plain.params()
    assert method.params() == {**plain.params(), "layer_alpha": 0.5, "layer_beta": 0.25}
    assert make(name, json.loads(json.dumps(method.params()))) == method != plain
    assert type(method).name == name and type(method).__doc__ == type(plain).__doc__
    assert make(name, {"layer_beta": 1}).params()["layer_alpha"] == 1


def test_what_changes_nothing_or_means_nothing_is_refused() -> None:
    for params, words in (
        ({"layer_alpha": 0}, "no expert would change anything"),
        ({"layer_alpha": -0.5}, "layer_alpha cannot be -0.5"),
        ({"layer_beta": "deep"}, "layer_beta cannot be 'deep'"),
        ({"layer_gamma": 1}, "no parameter 'layer_gamma'"),
    ):
        with pytest.raises(BadParameter, match=words):
            make("mean", params)
    make("mean", {"layer_alpha": 0, "layer_beta": 1})
