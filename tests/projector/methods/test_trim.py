"""TIES, DARE and breadcrumbs as they stream, against their formulas in float64."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from projector.algebra.linalg import ENERGY_NUMEL
from projector.driver.fold import Driver
from projector.laws.listing import listing
from projector.laws.trial import _sha256 as identity
from projector.laws.trial import merge
from projector.method import Contribution, Method, Totals, param
from projector.methods import make
from projector.methods.dare import Dare, random_bits, stream_key
from projector.methods.ties import Ties
from projector.spec import TensorSpec
from tests.oracles import trim

Tensors = dict[str, Tensor]
Oracle = Callable[..., Tensors]

SHAPES = {
    "square.weight": (48, 48),
    "tall.weight": (90, 12),
    "experts.weight": (3, 20, 28),
    "bias": (40,),
    "small": (7,),
    "scalar": (),
    "empty": (0, 4),
}
COUNT = 12
ORDERS = 4  # random ones: what depends on the order shows in nearly any other
WEIGHTS = [0.5, 1.0, 2.0, 0.7, 1.3, 0.25, 1.0, 3.0, 0.9, 1.1, 0.4, 1.6]
CPU = torch.device("cpu")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ties": ("ties", {}),
    "ties sum": ("ties", {"combine": "sum", "scale": 0.4}),
    "ties max": ("ties", {"combine": "max", "density": 0.5}),
    "ties whole": ("ties", {"density": 1.0}),
    "ties tensor": ("ties", {"scope": "tensor"}),
    "ties tensor sum": ("ties", {"scope": "tensor", "combine": "sum", "density": 0.5}),
    "ties tensor max": ("ties", {"scope": "tensor", "combine": "max"}),
    "dare": ("dare", {}),
    "dare half": ("dare", {"drop": 0.5, "seed": 7, "scale": 1.0}),
    "dare ties": ("dare", {"then": "ties", "drop": 0.6}),
    "dare ties trimmed": ("dare", {"then": "ties", "drop": 0.5, "density": 0.2, "combine": "sum"}),
    "breadcrumbs": ("breadcrumbs", {}),
    "breadcrumbs wide": ("breadcrumbs", {"gamma": 0.2, "density": 0.4, "scale": 1.0}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {}),
    "breadcrumbs_ties sum": ("breadcrumbs_ties", {"gamma": 0.1, "density": 0.3, "combine": "sum"}),
    "breadcrumbs_ties max": ("breadcrumbs_ties", {"combine": "max"}),
}
SUBTRACTABLE = [case for case in CASES if "max" not in case]


def experts_of(dtype: torch.dtype, seed: int = 0) -> tuple[Tensors, list[Tensors]]:
    """A base and twelve experts; of one tensor half the values are the base's, and one is all the base's."""
    draw = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}
    experts = []
    for _ in range(COUNT):
        expert = {name: (x.float() + 0.03 * torch.randn(x.shape, generator=draw)).to(dtype) for name, x in base.items()}
        expert["tall.weight"][::2] = base["tall.weight"][::2]
        experts.append(expert)
    experts[3]["bias"] = base["bias"]
    return base, experts


def truth_of(case: str, base: Tensors, experts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    name, params = CASES[case]
    if name == "dare":
        return trim.dare(base, experts, [identity(expert) for expert in experts], weights, **params)
    oracle: Oracle = getattr(trim, name)
    return oracle(base, experts, weights, **params)


def merged_vector(method: Method, base: Tensors, state: Tensors, totals: Totals) -> Tensors:
    """What a state adds to the base, before it is rounded."""
    vector = {}
    for name, tensor in base.items():
        spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
        slots = {key: state[f"{key}/{name}"] for key in method.slots(spec)}
        vector[name] = method.read(torch.zeros(spec.shape), slots, totals, spec)
    return vector


def gap(ours: Tensors, theirs: Tensors) -> float:
    """The largest ||ours - theirs|| / ||theirs|| of any tensor; where theirs is zero, ours must be."""
    assert ours.keys() == theirs.keys()
    apart = {name: (float((ours[name].double() - x).norm()), float(x.double().norm())) for name, x in theirs.items()}
    return max(error / norm if norm else (math.inf if error else 0.0) for error, norm in apart.values())


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        pytest.param([1.0] * COUNT, torch.float32, id="alike"),
        pytest.param(WEIGHTS, torch.bfloat16, id="weighted, in half precision"),
        pytest.param(WEIGHTS, torch.float32, id="weighted", marks=pytest.mark.slow),
        pytest.param([1.0] * COUNT, torch.bfloat16, id="alike, in half precision", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_twelve_experts_match_the_oracle(case: str, weights: list[float], dtype: torch.dtype) -> None:
    method = make(*CASES[case])
    base, experts = experts_of(dtype)
    truth = truth_of(case, base, experts, weights)
    published, state, totals = merge(method, base, experts, counting=weights)
    ours = merged_vector(method, base, state, totals)
    assert gap(ours, truth) <= 1e-5
    for name, tensor in published.items():
        exact = base[name].double() + truth[name]
        assert torch.allclose(tensor.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6), name
    assert all(truth[name].any() for name in ("square.weight", "tall.weight", "experts.weight", "bias"))


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_is_folded_in_pieces_matches_the_oracle(case: str) -> None:
    method = make(*CASES[case])
    draw = torch.Generator().manual_seed(0)
    base, *experts = ({"large.weight": torch.randn(260, 257, generator=draw)} for _ in range(3))
    assert base["large.weight"].numel() > ENERGY_NUMEL
    _, state, totals = merge(method, base, experts)
    assert gap(merged_vector(method, base, state, totals), truth_of(case, base, experts, [1.0, 1.0])) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_random_orders_give_the_same(case: str) -> None:
    """Of half the tensors: a stream costs by the tensor."""
    method = make(*CASES[case])
    base, experts = experts_of(torch.float32, seed=1)
    for tensors in (base, *experts):
        for name in ("experts.weight", "small", "scalar", "empty"):
            del tensors[name]
    pairs = list(zip(experts, WEIGHTS, strict=True))
    vectors = []
    for seed in range(ORDERS):
        random.Random(seed).shuffle(pairs)
        _, state, totals = merge(method, base, [e for e, _ in pairs], counting=[w for _, w in pairs])
        vectors.append({name: x.double() for name, x in merged_vector(method, base, state, totals).items()})
    assert all(gap(vector, vectors[0]) <= 1e-6 for vector in vectors[1:])


@pytest.mark.parametrize("case", SUBTRACTABLE)
def test_experts_can_be_taken_out(case: str) -> None:
    """Of twelve experts with weights that are no binary fractions the first, the third and the last."""
    method = make(*CASES[case])
    assert method.subtractable
    base, experts = experts_of(torch.float32, seed=2)
    gone, left = [0, 2, 11], [i for i in range(COUNT) if i not in (0, 2, 11)]
    _, state, totals = merge(
        method,
        base,
        [*experts, *(experts[i] for i in gone)],
        counting=[*WEIGHTS, *(-WEIGHTS[i] for i in gone)],
    )
    truth = truth_of(case, base, [experts[i] for i in left], [WEIGHTS[i] for i in left])
    assert totals.experts == len(left)
    assert gap(merged_vector(method, base, state, totals), truth) <= 1e-5


@pytest.mark.parametrize("case", SUBTRACTABLE)
def test_where_every_expert_is_taken_out_the_base_is_left(case: str) -> None:
    base, experts = experts_of(torch.float32)
    weights, _, totals = merge(
        make(*CASES[case]), base, [*experts[:3], *experts[:3]], counting=[0.7, 1.0, 0.1, -0.7, -1.0, -0.1]
    )
    assert totals.experts == 0
    for name, tensor in base.items():
        assert torch.equal(weights[name], tensor), name


def held(method: Method, values: Sequence[tuple[float, list[float]]]) -> list[float]:
    """What is merged from a base of zeros and experts with these weights and values."""
    base = {"w": torch.zeros(len(values[0][1]))}
    counting = [weight for weight, _ in values]
    return merge(method, base, [{"w": torch.tensor(x)} for _, x in values], counting=counting)[0]["w"].tolist()


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_sole_vote_of_a_light_expert_counts(combine: str, sign: float) -> None:
    method = make("ties", {"density": 1, "combine": combine})
    merged = held(method, [(1e3, [sign, 0.0])] * 3 + [(1e-3, [0.0, sign])])
    truth = {"mean": [sign, sign], "sum": [3e3 * sign, 1e-3 * sign], "max": [1e3 * sign, 1e-3 * sign]}
    assert merged == pytest.approx(truth[combine], rel=1e-6)


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_a_light_expert_is_alone_once_heavy_ones_are_taken_out(combine: str) -> None:
    """One that has no value where they had theirs, and one that has."""
    method = make("ties", {"density": 1, "combine": combine})
    heavy = [(1e3 / 3, [1.0, -0.7, 0.5]), (0.3, [0.1, -0.3, 0.7]), (777.7, [0.7, -1.0, 0.9])]
    out = [(-weight, values) for weight, values in heavy]
    merged = held(method, [*heavy, (1e-3, [0.0, 0.0, -1.0]), *out])
    assert merged == pytest.approx([0.0, 0.0, -1.0 if combine == "mean" else -1e-3], rel=1e-6)


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_was_taken_out_has_no_vote_in_the_majority(combine: str, order: tuple[int, int]) -> None:
    """Ten weights are undecided, thirty elect plus; a thousand more had values that are gone."""

    def values(gone: float, undecided: float, decided: float) -> list[float]:
        return [gone] * 1000 + [undecided] * 10 + [decided] * 30

    for turn in (1, -1):
        gone = [(0.3, values(0.1 * turn, 0.0, 0.0)), (0.7, values(0.7 * turn, 0.0, 0.0))]
        stay = [(1.0, values(0.0, 1.0, 1.0)), (1.0, values(0.0, -1.0, 1.0))]
        method = make("ties", {"density": 1, "combine": combine})
        merged = held(method, [*gone, *stay, *((-gone[i][0], gone[i][1]) for i in order)])
        assert merged == values(0.0, 1.0, 1.0 if combine == "mean" else 2.0)


@pytest.mark.parametrize("name", ["task_arithmetic", "breadcrumbs", "dare"])
def test_with_no_expert_left_the_scale_is_zero(name: str) -> None:
    base, experts = experts_of(torch.float32)
    _, _, totals = merge(make(name), base, [experts[0]] * 2, counting=[0.3, -0.3])
    assert totals.scalars["scale"] == 0.0


@dataclass(frozen=True)
class DareTiesTrimmed(Dare):
    """DARE with a trimming, as a method of its own, whose defaults are listed."""

    then: str = param("ties", "as in dare", choices=("linear", "ties"))
    density: float = param(0.5, "as in dare", low=0, high=1, idle=0)


def test_every_reading_of_an_expert_is_listed() -> None:
    """For its sha256, for two surveys, and for the fold."""
    assert [listing(cls).reads for cls in (Ties, Dare, DareTiesTrimmed)] == [3, 2, 4]


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("max")])
def test_a_maximum_cannot_be_taken_out(case: str) -> None:
    assert not make(*CASES[case]).subtractable


def elected(first: list[float], second: list[float], **params: Any) -> list[float]:
    base = {"w": torch.zeros(len(first))}
    weights, _, _ = merge(make("ties", params), base, [{"w": torch.tensor(first)}, {"w": torch.tensor(second)}])
    return weights["w"].tolist()


def test_where_values_cancel_out_the_sign_of_the_model_decides() -> None:
    """The first weight is undecided; the others elect plus, or minus."""
    first, second = [2.0, 1.0, 3.0, -1.0], [-2.0, 2.0, 1.0, -1.0]
    assert elected(first, second, density=1) == [2.0, 1.5, 2.0, -1.0]
    assert elected(first, second, density=1, combine="sum") == [2.0, 3.0, 4.0, -2.0]
    assert elected(first, second, density=1, combine="max") == [2.0, 2.0, 3.0, -1.0]
    turned = [[-x for x in values] for values in (first, second)]
    assert elected(*turned, density=1) == [-2.0, -1.5, -2.0, 1.0]


def test_values_that_cancel_out_up_to_rounding_are_undecided() -> None:
    """0.1 * 3 - 0.3 and 0.7 * 3 - 2.1 are no zeros in float32; in half precision values like these are common."""
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor(values)} for values in ([3.0, 1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0])]
    for small in (0.1, 0.7):
        for combine, agreed in (("sum", 3 * small), ("mean", 3.0), ("max", 3 * small)):
            for turn in (1, -1):
                weights, _, _ = merge(
                    make("ties", {"density": 1, "combine": combine}),
                    base,
                    experts[::turn],
                    counting=[small, 3 * small][::turn],
                )
                assert weights["w"][0].item() == pytest.approx(agreed, rel=1e-6), (small, combine, turn)


def test_values_equal_to_the_smallest_that_is_kept_are_kept() -> None:
    assert elected([4.0, 1.0, -1.0, 0.5], [0.0] * 4, density=0.25) == [4.0, 1.0, -1.0, 0.0]


def test_one_threshold_for_the_model_or_one_for_each_tensor() -> None:
    base = {"loud": torch.zeros(10), "quiet": torch.zeros(10)}
    expert = {"loud": torch.arange(1.0, 11.0), "quiet": torch.arange(1.0, 11.0) / 100}
    whole, each = (merge(make("ties", {"scope": s}), base, [expert])[0] for s in ("model", "tensor"))
    assert [int(whole[name].count_nonzero()) for name in base] == [5, 0]
    assert [int(each[name].count_nonzero()) for name in base] == [3, 3]


def test_breadcrumbs_leave_something_of_every_tensor() -> None:
    """Where a tensor is too small for an outlier it has none, and what is all alike stays whole."""
    shapes = {"scalar": 1, "pair": 2, "small": 99, "hundred": 100, "thousand": 1000}
    base = {name: torch.zeros(n) for name, n in shapes.items()} | {"alike": torch.zeros(300)}
    expert = {name: torch.arange(1.0, n + 1) for name, n in shapes.items()} | {"alike": -torch.ones(300)}
    weights, _, _ = merge(make("breadcrumbs", {"scale": 1.0}), base, [expert])
    kept = {name: weights[name][weights[name] != 0].tolist() for name in base}
    assert kept["scalar"] == [1.0]
    assert kept["pair"] == [1.0, 2.0]
    assert kept["small"] == [float(x) for x in range(11, 100)]
    assert kept["hundred"] == [float(x) for x in range(11, 100)]
    assert kept["thousand"] == [float(x) for x in range(100, 991)]
    assert kept["alike"] == [-1.0] * 300


def test_the_random_numbers_are_splitmix64() -> None:
    """The published first numbers of seed 1234567, and any part of any stream against whole numbers in Python."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert trim.splitmix64(1234567, 4) == published
    for key in (0, 1, 1234567, 2**63 - 1, 2**63, 2**64 - 1, stream_key("a" * 64, "w", 3)):
        numbers = [trim.signed(x) for x in trim.splitmix64(key, 300)]
        assert random_bits(key, 0, 300, CPU).tolist() == numbers
        assert random_bits(key, 123, 100, CPU).tolist() == numbers[123:223]
    far = (2**40 + 5) * 0x9E3779B97F4A7C15 % 2**64
    assert random_bits(0, 2**40 + 5, 3, CPU).tolist() == [trim.signed(x) for x in trim.splitmix64(far, 3)]


def test_a_mask_is_the_same_in_any_blocks_and_on_replay() -> None:
    base, experts = experts_of(torch.float32)
    states = [merge(make("dare"), base, experts[:2], Driver(block_bytes=size))[1] for size in (1 << 20, 1 << 20, 4096)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert torch.equal(tensor, states[2][name]), name


N = 200_000


def mask(drop: float, expert: str = "1" * 64, tensor: str = "w", seed: int = 0) -> Tensor:
    spec = TensorSpec(tensor, (N,), torch.float32)
    thinned = Dare(drop=drop, seed=seed).thin(torch.ones(N), spec, Contribution(1, sha256=expert))
    assert set(thinned.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - drop)).item()}
    return (thinned > 0).double()


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_the_share_that_is_kept_is_right_to_four_standard_deviations(drop: float) -> None:
    for seed in range(5):
        share = mask(drop, seed=seed).mean().item()
        assert abs(share - (1 - drop)) <= 4 * math.sqrt(drop * (1 - drop) / N)


@pytest.mark.parametrize("drop", [0.5, 0.9])
def test_masks_of_other_experts_tensors_and_seeds_are_independent(drop: float) -> None:
    """And so are neighbours within a mask: every correlation lies within four standard deviations of zero."""
    masks = [
        mask(drop),
        mask(drop, expert="2" * 64),
        mask(drop, tensor="v"),
        mask(drop, seed=1),
        *(mask(drop).roll(lag) for lag in (1, 2, 3, 7, 256, 1024)),
    ]
    for other in masks[1:]:
        correlation = torch.corrcoef(torch.stack([masks[0], other]))[0, 1].item()
        assert abs(correlation) <= 4 / math.sqrt(N)
