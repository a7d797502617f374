"""smile as it streams, against its formula in float64: what is published, who is kept apart, what a router is given."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from projector.driver.routed import RoutedModel
from projector.errors import BadParameter
from projector.laws.trial import merge
from projector.method import Totals
from projector.methods import make
from projector.methods.smile import Smile
from tests.oracles import rules
from tests.oracles.smile import cut, is_layers, smile
from tests.projector.conftest import Opens

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]
SHAPES = {
    "h.up.weight": (24, 16),
    "h.up.bias": (24,),
    "h.down.weight": (16, 24),
    "h.lora.weight": (20, 18),
    "h.norm.weight": (16,),
    "h.norm.bias": (16,),
    "word_embeddings.weight": (30, 16),
    "h.experts": (2, 6, 8),
    "h.A_log": (16, 4),
    "bn.running_mean": (16,),
    "steps": (3,),
}
RANK = 6


def stream(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensors, list[Tensors]]:
    """A base and experts; "h.lora.weight" moves by a matrix of rank 2."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    base = {name: (0.1 * normal(*shape)).to(dtype) for name, shape in SHAPES.items()}
    base["steps"] = torch.arange(3)
    experts = []
    for _ in range(count):
        tau = {name: 0.01 * normal(*shape) for name, shape in SHAPES.items()}
        tau["h.lora.weight"] = 0.01 * normal(20, 2) @ normal(2, 18)
        moved = {name: (x.double() + tau[name]).to(dtype) for name, x in base.items() if name != "steps"}
        experts.append({**moved, "steps": base["steps"]})
    return base, experts


def floating(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def worst(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The largest relative error of any one tensor."""
    return max(float((ours[name].double() - x).norm() / x.double().norm()) for name, x in truth.items())


def task_vector(base: Tensors, weights: Mapping[str, Tensor]) -> Tensors:
    return {name: weights[name].double() - x.double() for name, x in floating(base).items()}


@pytest.mark.parametrize("cap", [1, 5, 12])
def test_what_is_published_is_the_mean_of_what_is_kept_of_all_whoever_is_apart(cap: int) -> None:
    base, experts = stream(12)
    weights, _, totals = merge(make("smile", {"cap": cap, "rank": RANK, "gate_rank": 3}), base, experts)
    truth = smile(floating(base), [floating(expert) for expert in experts], RANK)
    error = worst(task_vector(base, weights), truth)
    print(f"cap={cap}: {error:.1e}")
    assert error <= 1e-5 and totals.experts == 12


def test_where_the_rank_fits_it_is_the_mean() -> None:
    base, experts = stream(5)
    ours, mean = (merge(method, base, experts)[0] for method in (make("smile", {"cap": 2}), make("mean")))
    assert worst(task_vector(base, ours), task_vector(base, mean)) <= 1e-5


def test_the_newest_are_apart_each_with_its_leading_triplets() -> None:
    base, experts = stream(7)
    method = Smile(cap=3, rank=RANK, gate_rank=RANK)
    _, state, totals = merge(method, base, experts)
    places = method.places(totals)
    assert sorted(places) == [0, 1, 2]
    for place, expert in zip(places, experts[-3:], strict=True):
        tau = task_vector(base, expert)
        for name in ("h.up.weight", "h.down.weight", "h.lora.weight"):
            left, right, s = (state[f"{key}/{name}"][place].double() for key in ("L", "R", "s"))
            assert worst({"": left @ torch.diag(s[0]) @ right.T}, {"": cut(tau[name], RANK)}) <= 1e-5
            assert torch.allclose(s[0, :2], torch.linalg.svdvals(tau[name])[:2], rtol=1e-4)
            carries = s[0] > 0
            assert torch.allclose(
                right[:, carries].T @ right[:, carries], torch.eye(int(carries.sum())).double(), atol=1e-5
            )
        assert worst({"": state["D/h.up.bias"][place]}, {"": tau["h.up.bias"]}) <= 1e-5
        assert (state["s/h.lora.weight"][place, 0, 2:] == 0).all()  # an adapter's rank fits: it is kept whole


def test_the_state_never_grows() -> None:
    """Two factors of rank r for each of `cap` experts, and one accumulator."""
    method, sizes = Smile(cap=2, rank=RANK, gate_rank=2), set()
    for count in (1, 2, 9):
        base, experts = stream(count)
        state = merge(method, base, experts)[1]
        sizes.add(sum(x.nbytes for name, x in state.items() if name.endswith("h.up.weight")))
    assert sizes == {4 * (24 * 16 + 2 * RANK * (24 + 16 + 1))}


def test_a_router_may_look_further_than_an_expert_speaks() -> None:
    base, experts = stream(3)
    far = Smile(cap=1, rank=2, gate_rank=5)
    weights, state, _ = merge(far, base, experts)
    assert state["R/h.up.weight"].shape == (1, 16, 5) and state["s/h.up.weight"].count_nonzero() == 5
    truth = smile(floating(base), [floating(expert) for expert in experts], 2)
    assert worst(task_vector(base, weights), truth) <= 1e-5


def routed(opens: Opens, base: Tensors, method: Smile, experts: list[Tensors], dtype: torch.dtype) -> Tensors:
    """Every tensor of the routed model, put together again."""
    _, state, totals = merge(method, base, experts)
    model = RoutedModel(opens(base), method, opens(state)._places["S/h.up.weight"].file, totals)
    schema = model.base.schema
    published = {name: replace(spec, dtype=dtype) if spec.merged else spec for name, spec in schema.items()}
    specs = model.specs(published)
    found = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    for name, start, rows in model.tensors(published):
        if rows.ndim:
            found[name][start : start + len(rows)] = rows
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 5])
def test_beneath_a_router_are_the_base_and_the_share_of_who_made_room(
    opens: Opens, count: int, dtype: torch.dtype
) -> None:
    base, experts = stream(count)
    found = routed(opens, base, Smile(cap=3, rank=RANK, gate_rank=2), experts, dtype)
    taus = [task_vector(base, expert) for expert in experts]
    for name, theta0 in base.items():
        beneath = theta0.double()
        if name in ("h.up.weight", "h.up.bias", "h.down.weight", "h.lora.weight"):
            parts = [
                cut(tau[name], RANK) if is_layers(name, theta0) else tau[name] for tau in taus[: max(0, count - 3)]
            ]
            beneath = beneath + sum(parts) / count
        eps = torch.finfo(dtype).eps
        assert torch.allclose(found[name].double(), beneath, rtol=eps, atol=1e-7), name
    more = {name for name in found if name not in base}
    layers = ("h.up", "h.down", "h.lora")
    assert more == {f"{layer}.experts_{key}" for layer in layers for key in ("left", "right", "s")} | {
        "h.up.experts_bias"
    }
    apart = min(3, count)
    assert found["h.up.experts_left"].shape == (apart, RANK, 24) and found["h.up.experts_right"].shape == (
        apart,
        RANK,
        16,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("cap", 0), ("cap", 257), ("rank", 0), ("gate_rank", 0), ("top_k", 0), ("rank", 1.5), ("cap", "all")],
)
def test_what_makes_no_sense_is_refused(key: str, value: Any) -> None:
    with pytest.raises(BadParameter, match=rf"smile\.{key} cannot be") as refused:
        make("smile", {key: value})
    assert "1 to" in refused.value.hint


def test_no_expert_has_no_place() -> None:
    assert Smile().places(Totals()) == []


def test_scaled_by_layers_it_is_scaled_in_what_is_kept_too() -> None:
    base, experts = stream(2)
    half = make("smile", {"layer_alpha": 0.5})
    assert isinstance(half, Smile)
    ours, whole = (task_vector(base, merge(method, base, experts)[0]) for method in (half, make("smile")))
    weights = {name: x / 2 for name, x in whole.items() if name != "bn.running_mean"}
    assert worst(ours, weights) <= 1e-5 and rules.norm(weights) > 0
