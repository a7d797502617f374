"""Fisher merging, RegMean and MaTS as they stream, against their formulas in float64; and the sidecars they refuse."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from projector.errors import BadParameter, BadSchema, BadValues, ProjectorError, Reason
from projector.laws.checks import LAWS, Law
from projector.laws.trial import merge, sidecar, stream
from projector.method import Contribution, Method, State, Totals
from projector.methods import make
from projector.methods._curvature import gram
from projector.methods.fisher import Fisher
from projector.methods.mats import Mats
from projector.methods.regmean import RegMean
from projector.spec import TensorSpec
from tests.oracles import rules, sidecars

Tensors = Mapping[str, Tensor]

COUNT = 12
ORDERS = 4  # random ones: what depends on the order shows in nearly any other
WEIGHTS = [1.0, 0.25, 3.0, 1.0, 2.5, 0.1, 1.0, 4.0, 0.7, 1.3, 1.0, 2.0]
SQUARE = TensorSpec("layer.weight", (4, 4), torch.float32)
ONE = torch.ones(4, 4)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fisher": ("fisher", {}),
    "fisher as it is": ("fisher", {"normalise": False}),
    "fisher floored": ("fisher", {"floor": 0.1}),
    "regmean": ("regmean", {}),
    "regmean hardly damped": ("regmean", {"off_diagonal": 0.99, "ridge": 1e-3}),
    "regmean everywhere": ("regmean", {"exclude": ()}),
    "mats": ("mats", {}),
    "mats cut short": ("mats", {"iterations": 3}),
    "mats fisher": ("mats", {"curvature": "fisher"}),
    "mats fisher cut short": ("mats", {"curvature": "fisher", "iterations": 7}),
    "mats fisher everywhere": ("mats", {"curvature": "fisher", "exclude": ()}),
}


@pytest.mark.parametrize(
    ("dtype", "counting"),
    [
        pytest.param(torch.float32, [1.0] * COUNT, id="alike"),
        pytest.param(torch.bfloat16, WEIGHTS, id="weighted, in half precision"),
        pytest.param(torch.float32, WEIGHTS, id="weighted", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, [1.0] * COUNT, id="alike, in half precision", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_twelve_arrivals_match_the_oracle(case: str, dtype: torch.dtype, counting: list[float]) -> None:
    name, params = CASES[case]
    method, base, experts = make(name, params), *in_dtype(dtype)
    weights, state, totals = merge(method, base, experts, counting=counting)
    brought = [sidecar(method.needs[0], expert) for expert in experts]
    truth = getattr(sidecars, name)(base, experts, brought, counting, **params)
    error = gap(merged_vector(method, base, state, totals), base, truth)
    print(f"{case} {dtype}: {error:.1e}")
    assert error <= 1e-5
    for key, tensor in weights.items():
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.double(), truth[key], rtol=torch.finfo(dtype).eps, atol=1e-6), key


@pytest.mark.parametrize(
    "case", ["fisher", "regmean", "mats", "mats cut short", "mats fisher", "mats fisher cut short"]
)
def test_the_order_of_the_experts_does_not_matter(case: str) -> None:
    name, params = CASES[case]
    method, base, experts = make(name, params), *in_dtype(torch.float32)
    first, _, _ = merge(method, base, experts, counting=WEIGHTS)
    for seed in range(ORDERS):
        order = random.Random(seed).sample(range(COUNT), COUNT)
        other, _, _ = merge(method, base, [experts[i] for i in order], counting=[WEIGHTS[i] for i in order])
        for key, tensor in first.items():
            assert torch.allclose(tensor, other[key], rtol=1e-6, atol=1e-6), key


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", ["fisher as it is", "regmean everywhere", "mats fisher cut short"])
def test_laws_where_several_parameters_differ(case: str, law: Law) -> None:
    law(make(*CASES[case]))


def test_each_method_differs_from_the_mean() -> None:
    """Otherwise the comparisons above would compare means."""
    base, experts = in_dtype(torch.float32)
    plain, _, _ = merge(make("mean"), base, experts)
    for name in ("fisher", "regmean", "mats"):
        weights, _, _ = merge(make(name), base, experts)
        assert float((weights["square.weight"] - plain["square.weight"]).abs().max()) > 0.01, name


def test_an_expert_with_large_gradients_everywhere_does_not_outvote_the_others() -> None:
    experts = [(ONE, 1e6 * ONE), (-ONE, ONE)]
    loud = folded(Fisher(normalise=False), SQUARE, experts)
    assert torch.allclose(loud, ONE, rtol=1e-4)
    level = folded(Fisher(), SQUARE, experts)
    assert torch.allclose(level, torch.zeros(4, 4), atol=1e-6)


def test_the_expert_that_is_sure_is_taken_out_again_without_a_trace() -> None:
    """Its Fisher is nine decades above the others', which sums in float32 would not survive."""
    generator = torch.Generator().manual_seed(0)
    taus = [torch.randn(4, 4, generator=generator) for _ in range(3)]
    fishers = [torch.rand(4, 4, generator=generator) * size for size in (1e-5, 1e-5, 1e4)]
    method, stream = Fisher(normalise=False), [*zip(taus, fishers, strict=True)]
    less = folded(method, SQUARE, [*stream, stream[2]], [1, 1, 1, -1])
    assert torch.allclose(less, folded(method, SQUARE, stream[:2]), rtol=1e-5)


def test_regmean_fits_the_outputs_on_every_experts_inputs() -> None:
    """Against the least-squares problem itself: the stacked inputs and what each expert's layer makes of its own."""
    generator = torch.Generator().manual_seed(0)
    taus = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    inputs = [torch.randn(10, 4, generator=generator) for _ in range(3)]
    weights = [1.0, 2.0, 0.5]
    spec = TensorSpec("layer.weight", (6, 4), torch.float32)
    method = RegMean(off_diagonal=0.99, ridge=1e-9)
    ours = folded(method, spec, [(tau, x.T @ x) for tau, x in zip(taus, inputs, strict=True)], weights)
    damped = [torch.cat([0.99**0.5 * x, 0.01**0.5 * x.norm(dim=0).diag()]) for x in inputs]
    left = torch.cat([c**0.5 * x for c, x in zip(weights, damped, strict=True)])
    right = torch.cat([c**0.5 * x @ tau.T for c, tau, x in zip(weights, taus, damped, strict=True)])
    assert torch.allclose(ours, torch.linalg.lstsq(left, right).solution.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.95, 0.99])
def test_regmean_stays_at_the_base_where_there_was_no_input(off_diagonal: float) -> None:
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    method = RegMean(off_diagonal=off_diagonal)
    moved = folded(method, SQUARE, [(ONE, x.T @ x)])
    assert float(moved[:, 2:].abs().max()) == 0
    assert float(moved[:, :2].abs().min()) > 0.1
    assert torch.equal(folded(method, SQUARE, [(ONE, torch.zeros(4, 4))]), torch.zeros(4, 4))


def test_regmean_raises_the_ridge_over_rounding_and_refuses_what_is_no_gram_matrix() -> None:
    x = torch.tensor([[1.0, 100.0, 100.0, 100.0]])
    rounded = x.T @ x - 0.5 * torch.eye(4)
    assert folded(RegMean(off_diagonal=0.99), SQUARE, [(ONE, rounded)]).isfinite().all()
    with pytest.raises(BadValues, match=r"layer\.weight .* not positive semidefinite") as caught:
        folded(RegMean(off_diagonal=0.99), SQUARE, [(ONE, 5 * ONE - 4 * torch.eye(4))])
    assert caught.value.reason is Reason.BAD_SIDECAR


@pytest.mark.parametrize("off_diagonal", [0.95, 0.99])
def test_regmean_tells_float32_grams_of_few_inputs_from_their_rounding(off_diagonal: float) -> None:
    """Against the same in float64, where n = 64 inputs were seen in 8 directions. Undamped it was off by 98 %."""
    taus, inputs = few_inputs(4, 2)
    method, spec = RegMean(off_diagonal=off_diagonal), TensorSpec("layer.weight", (8, 64), torch.float32)
    ours = folded(method, spec, [(tau, (x.T @ x).float()) for tau, x in zip(taus, inputs, strict=True)])
    keep = off_diagonal + (1 - off_diagonal) * torch.eye(64)
    grams = [keep * (x.T @ x) for x in inputs]
    total = sum(grams, 1e-6 * sum(g.trace() / 64 for g in grams) * torch.eye(64).double())
    right = sum((g @ tau.double().T for g, tau in zip(grams, taus, strict=True)), torch.zeros(64, 8).double())
    truth = torch.linalg.solve(total, right).T
    assert float((ours - truth).norm() / truth.norm()) <= 1e-4
    with pytest.raises(BadParameter, match="off_diagonal"):
        RegMean(off_diagonal=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [[1.0] * 4, [0.3, 0.7, 2.0, 1.0]], ids=["alike", "weighted"])
@pytest.mark.parametrize(("count", "rows"), [(2, 2), (4, 2), (4, 8), (4, 15)])
def test_mats_solves_what_few_inputs_determine_and_leaves_the_rest(
    count: int, rows: int, weights: list[float], dtype: torch.dtype
) -> None:
    """n = 64 inputs, seen in count * rows directions: rounding alone stands in the others."""
    taus, inputs = few_inputs(count, rows)
    spec = TensorSpec("layer.weight", (8, 64), torch.float32)
    stream = [(tau, (x.T @ x).to(dtype)) for tau, x in zip(taus, inputs, strict=True)]
    counts = weights[:count]
    start = sum((c * tau for c, tau in zip(counts, taus, strict=True)), torch.zeros(8, 64))
    truth = sidecars.nearest_solution(inputs, taus, counts, start)
    error = float((folded(Mats(), spec, stream, counts) - truth).norm() / truth.norm())
    print(f"{count} experts of {rows} rows: {error:.1e}")
    assert error <= 5e-5
    grown = folded(Mats(iterations=10000), spec, stream, counts)
    assert float((grown - truth).norm() / truth.norm()) <= 5e-5


@pytest.mark.parametrize("lossy", [Mats(), RegMean(), Mats(curvature="fisher")], ids=["mats", "regmean", "mats fisher"])
@pytest.mark.parametrize("seed", range(10))
def test_curvature_that_is_taken_out_again_leaves_nothing_to_divide_by(lossy: Method, seed: int) -> None:
    """0.3 and 0.7 do not cancel to the last bit; the third expert brings no curvature, and rounding must not be one."""
    generator = torch.Generator().manual_seed(seed)
    first, second, third = (torch.randn(4, 4, generator=generator) for _ in range(3))
    inputs = [torch.randn(8, 4, generator=generator) for _ in range(2)]
    grams = [(x.T @ x).abs() if lossy.needs == ("fisher",) else x.T @ x for x in inputs]
    stream = [(first, grams[0]), (second, grams[1]), (third, torch.zeros(4, 4))]
    less = folded(lossy, SQUARE, [*stream, *stream[:2]], [0.3, 0.7, 1.0, -0.3, -0.7])
    alone = folded(lossy, SQUARE, stream[2:])
    assert torch.allclose(less, alone, atol=1e-6)


def test_mats_fisher_tells_the_rounding_of_single_weights_from_curvature() -> None:
    """The expert that stays knows half of the weights only; the Fishers that were taken out are nine decades larger."""
    generator = torch.Generator().manual_seed(0)
    taus = [torch.randn(4, 4, generator=generator) for _ in range(3)]
    half = torch.rand(4, 4, generator=generator) * (torch.arange(16).reshape(4, 4) % 2)
    stream = [*zip(taus, [1e9 * ONE, 3e8 * ONE + half, half], strict=True)]
    method = Mats(curvature="fisher")
    less = folded(method, SQUARE, [*stream, *stream[:2]], [0.3, 0.7, 1.0, -0.3, -0.7])
    assert torch.allclose(less, folded(method, SQUARE, stream[2:]), atol=1e-4)


def test_a_weight_whose_fisher_is_down_to_rounding_is_the_bases() -> None:
    """What stays of F = 1e12 after 0.3 and 0.7 of it are taken out says nothing; the floor of 1e-6 is far below it."""
    sure = torch.tensor([1e12, 1.0]).expand(4, 2).reshape(2, 4).repeat(2, 1)
    stream = [(ONE, sure), (2 * ONE, sure), (3 * ONE, torch.zeros(4, 4))]
    method = Fisher(normalise=False)
    less = folded(method, SQUARE, [*stream, *stream[:2]], [0.3, 0.7, 1.0, -0.3, -0.7])
    assert torch.equal(less[sure > 1], torch.zeros(8))
    assert torch.allclose(less[sure == 1], torch.full((8,), 3.0), rtol=1e-3)
    with pytest.raises(BadParameter, match="floor"):
        Fisher(floor=1e-20)


def test_mats_averages_what_is_excluded_with_fisher_too() -> None:
    spec = TensorSpec("model.embed_tokens.weight", (4, 4), torch.float32)
    stream = [(ONE, 9 * ONE), (4 * ONE, ONE)]
    method = Mats(curvature="fisher")
    assert method.elementwise(spec) and not method.elementwise(SQUARE)
    assert torch.allclose(folded(method, spec, stream, [1.0, 2.0]), 3 * ONE)
    assert torch.allclose(folded(Mats(curvature="fisher", exclude=()), spec, stream), 1.3 * ONE)


def test_a_gram_matrix_is_made_symmetric() -> None:
    """A solver may read one triangle of it, while products read both."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    skew = 4e-4 * (ONE.triu(1) - ONE.tril(-1)) * (x.T @ x).diagonal().max()
    level = gram(Contribution(1, sidecars={"gram": x.T @ x}), SQUARE)
    lopsided = gram(Contribution(1, sidecars={"gram": x.T @ x + skew}), SQUARE)
    assert torch.equal(lopsided, lopsided.T)
    assert torch.allclose(lopsided, level, atol=1e-5)


def test_mats_reaches_the_solution_and_keeps_the_sum_where_there_is_no_curvature() -> None:
    taus, x = [ONE, 3 * ONE], torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    weights = [1.0, 3.0]
    ours = folded(Mats(), SQUARE, [(tau, x.T @ x) for tau in taus], weights)
    assert torch.allclose(ours[:, :2], torch.full((4, 2), 10 / 4))
    assert torch.allclose(ours[:, 2:], torch.full((4, 2), 10.0))
    f = torch.eye(4)
    ours = folded(Mats(curvature="fisher"), SQUARE, [(tau, f) for tau in taus], weights)
    assert torch.allclose(ours, torch.where(f > 0, 10 / 4, 10.0))


def test_a_two_sided_kronecker_curvature_is_refused_by_name() -> None:
    with pytest.raises(BadParameter, match=r"kronecker.*fixed size"):
        make("mats", {"curvature": "kronecker"})


NAN = torch.full((4, 4), float("nan"))
BAD_FISHERS = {
    "missing": None,
    "shape": torch.ones(4, 5),
    "vector": torch.ones(4),
    "negative": torch.eye(4) - 1e-3,
    "nan": NAN,
    "infinite": ONE / 0,
}
BAD_GRAMS = {
    "missing": None,
    "shape": torch.ones(5, 5),
    "vector": torch.ones(4),
    "lopsided": ONE.triu(),
    "negative": -torch.eye(4),
    "nan": NAN,
    "infinite": ONE / 0,
}


@pytest.mark.parametrize(
    ("method", "kind", "brought"),
    [
        *(
            (make(name, params), "fisher", bad)
            for name, params in (("fisher", {}), ("fisher", {"normalise": False}), ("mats", {"curvature": "fisher"}))
            for bad in BAD_FISHERS.items()
        ),
        *((make(name), "gram", bad) for name in ("regmean", "mats") for bad in BAD_GRAMS.items()),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else value[0] if isinstance(value, tuple) else value,
)
def test_a_bad_sidecar_is_refused_by_the_tensors_name(
    method: Method, kind: str, brought: tuple[str, Tensor | None]
) -> None:
    how, value = brought
    with pytest.raises(ProjectorError, match=r"layer\.weight") as caught:
        folded(method, SQUARE, [(ONE, value)])
    assert isinstance(caught.value, BadSchema if how in ("missing", "shape", "vector") else BadValues)
    assert caught.value.reason is Reason.BAD_SIDECAR
    assert f"{kind}.safetensors" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_does_for_a_fisher_but_not_for_a_gram_matrix(dtype: torch.dtype) -> None:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    g = (x.T @ x).to(dtype)
    for method in (Mats(curvature="fisher"), Fisher()):
        assert folded(method, SQUARE, [(ONE, g.abs())]).isfinite().all()
    for solver in (RegMean(), Mats()):
        with pytest.raises(BadValues, match=rf"layer\.weight .*{dtype}") as caught:
            folded(solver, SQUARE, [(ONE, g)])
        assert caught.value.reason is Reason.BAD_SIDECAR
        assert "float32" in caught.value.hint


def folded(
    method: Method, spec: TensorSpec, stream: Sequence[tuple[Tensor, Tensor | None]], weights: list[float] | None = None
) -> Tensor:
    """The merged task vector, float32, of one tensor after these deltas and what each expert brought for it."""
    state: State = {key: torch.zeros(slot.shape, dtype=slot.dtype) for key, slot in method.slots(spec).items()}
    totals = Totals()
    for index, (delta, brought) in enumerate(stream, start=1):
        sidecars = {} if brought is None else {method.needs[0]: brought}
        expert = Contribution(index, weight=weights[index - 1] if weights else 1.0, sidecars=sidecars)
        for _ in range(method.rounds):
            expert = Contribution(index, "", expert.weight, [method.survey(state, delta, spec, expert)], sidecars)
        state, sums = method.update(state, delta, spec, expert)
        totals = method.tally(totals, sums, expert)
    return method.read(torch.zeros(spec.shape), state, totals, spec)


def few_inputs(count: int, rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """(task vectors (8, 64), inputs (rows, 64) in float64) of this many experts."""
    generator = torch.Generator().manual_seed(0)
    taus = [torch.randn(8, 64, generator=generator) for _ in range(count)]
    return taus, [torch.randn(rows, 64, generator=generator).double() for _ in range(count)]


def in_dtype(dtype: torch.dtype) -> tuple[Tensors, list[Tensors]]:
    base, experts = stream(COUNT)
    cast = [{name: tensor.to(dtype) for name, tensor in weights.items()} for weights in (base, *experts)]
    return cast[0], cast[1:]


def merged_vector(method: Method, base: Tensors, state: Tensors, totals: Totals) -> dict[str, Tensor]:
    """The merged task vector in float64, before it is added to the base and rounded."""
    merged = {}
    for name, theta0 in base.items():
        spec = TensorSpec(name, tuple(theta0.shape), theta0.dtype)
        slots = {key: state[f"{key}/{name}"] for key in method.slots(spec)}
        merged[name] = method.read(torch.zeros(spec.shape).double(), slots, totals, spec)
    return merged


def gap(ours: Tensors, base: Tensors, truth: Tensors) -> float:
    """The largest relative error of any tensor's merged task vector."""
    theirs = {name: truth[name] - base[name].double() for name in base}
    return max(
        rules.norm({name: ours[name] - theirs[name]}) / rules.norm({name: theirs[name]})
        for name in base
        if base[name].numel()
    )
