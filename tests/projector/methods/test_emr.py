"""EMR's unified model and the experts' views, against their formulas in float64."""

import random

import pytest
import torch
from torch import Tensor

from projector.driver.steps import Step, read_bytes, record_specs, view_bytes
from projector.laws.listing import lines, listing
from projector.laws.trial import Tensors, merge, stream, views
from projector.methods import make
from projector.methods.emr import NEGATIVE, POSITIVE, pack, unpack
from projector.spec import TensorSpec
from tests.oracles import rules
from tests.oracles.emr import emr, emr_unified, emr_views

EMR = make("emr")


def relative_error(base: Tensors, ours: Tensors, truth: Tensors) -> float:
    """Of the task vectors, in the norm of the whole model."""
    error = rules.norm({name: ours[name].double() - truth[name].double() for name in truth})
    return error / rules.norm({name: truth[name].double() - base[name].double() for name in truth})


@pytest.mark.parametrize("rank", [None, 2])
def test_twelve_arrivals_match_the_oracle(rank: int | None) -> None:
    base, experts = stream(12, rank=rank)
    weights, _, totals = merge(EMR, base, experts)
    assert relative_error(base, weights, emr(base, experts)) <= 1e-6
    assert totals.experts == 12


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
@pytest.mark.parametrize("rank", [None, 2])
def test_every_view_matches_the_oracle(rank: int | None, block_bytes: int) -> None:
    base, experts = stream(12, rank=rank)
    truth = emr_views(base, experts)
    for ours, theirs in zip(views(EMR, base, experts, block_bytes), truth, strict=True):
        assert relative_error(base, ours, theirs) <= 1e-5
    assert relative_error(base, truth[0], truth[1]) > 0.1  # they are not all the same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_twelve_arrivals_in_half_precision_match_the_oracle(dtype: torch.dtype) -> None:
    """The published weights are the nearest ones; half precision makes ties and sums of zero common."""
    origin, arrivals = stream(12)
    base, *experts = ({name: x.to(dtype) for name, x in model.items()} for model in (origin, *arrivals))
    weights, _, _ = merge(EMR, base, experts)
    truth = emr(base, experts)
    for name, tensor in weights.items():
        assert torch.equal(tensor, truth[name].to(dtype)), name
    for ours, theirs in zip(views(EMR, base, experts), emr_views(base, experts), strict=True):
        for name, tensor in ours.items():
            assert torch.allclose(tensor.double(), theirs[name], rtol=torch.finfo(dtype).eps / 2, atol=1e-6), name


def test_a_bf16_base_with_cancelling_experts_matches_the_oracle() -> None:
    """In bf16 task vectors are small multiples of one step, and their sum is often exactly zero."""
    base, experts = stream(1)
    low = [{name: tensor.bfloat16() for name, tensor in model.items()} for model in (base, *experts)]
    base, experts = low[0], [low[1], {name: 2 * low[0][name] - low[1][name] for name in base}]
    unified = emr_unified(base, experts)
    zeros = sum(int((tensor == 0).sum()) for tensor in unified.values())
    assert zeros > 0.1 * sum(tensor.numel() for tensor in unified.values())
    _, state, _ = merge(EMR, base, experts)
    for name, truth in unified.items():
        spec = TensorSpec(name, tuple(truth.shape), torch.bfloat16)
        slots: dict[str, Tensor] = {key: state[f"{key}/{name}"] for key in EMR.slots(spec)}
        assert torch.equal(EMR.read(torch.zeros(truth.shape), slots, None, spec).double(), truth), name  # type: ignore[arg-type]


def test_the_unified_model_does_not_depend_on_the_order() -> None:
    base, experts = stream(12)
    first = merge(EMR, base, experts)[0]
    draw = random.Random(0)
    for _ in range(10):
        order = draw.sample(experts, len(experts))
        assert relative_error(base, merge(EMR, base, order)[0], first) <= 1e-6


def test_an_expert_alone_is_its_own_view() -> None:
    base, experts = stream(1)
    (view,) = views(EMR, base, experts)
    for name, tensor in experts[0].items():
        assert torch.allclose(view[name], tensor, rtol=1e-6, atol=1e-6), name


def test_an_expert_that_is_outvoted_everywhere_is_seen_as_the_base() -> None:
    base, (expert,) = stream(1)
    opposite = {name: base[name] - 0.5 * (expert[name] - base[name]) for name in base}
    _, view = views(EMR, base, [expert, opposite])
    for name, tensor in base.items():
        assert torch.equal(view[name], tensor), name


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7), (2, 9), (0, 3), (3, 0)])
def test_signs_survive_their_packing(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values[values.abs() < 0.3] = 0.0
    codes = unpack(pack(values), shape[1])
    assert torch.equal(codes == POSITIVE, values > 0)
    assert torch.equal(codes == NEGATIVE, values < 0)


def test_a_record_takes_two_bits_for_each_weight() -> None:
    schema = {"w": TensorSpec("w", (512, 1024), torch.float32), "steps": TensorSpec("steps", (3,), torch.int64)}
    specs = record_specs(EMR, schema)
    assert {spec.name for spec in specs} == {"signs/w", "magnitude/w"}
    assert sum(spec.nbytes for spec in specs) == 512 * 1024 // 4 + 512 * 8


def test_a_record_of_a_vector_takes_nine_bytes_for_each_weight_and_the_listing_says_so() -> None:
    specs = record_specs(EMR, {"bias": TensorSpec("bias", (100,), torch.float32)})
    assert sum(spec.nbytes for spec in specs) == 900
    assert listing(type(EMR)).vector_record_bytes_per_parameter == 9
    assert "9 of a vector" in dict(lines(listing(type(EMR))))["keeps of each expert"]


def test_a_view_needs_one_workspace() -> None:
    step = Step(TensorSpec("w", (64, 32), torch.float32))
    record = sum(spec.nbytes for spec in EMR.keeps(step.spec).values())
    assert view_bytes(EMR, step) == read_bytes(EMR, step) + record
