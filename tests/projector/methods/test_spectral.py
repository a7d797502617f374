"""iso_c, tsv_m, wudi, confluence, ace and OPCM's isotropic read-out as they stream, against the offline methods in
float64."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from projector.algebra.svd import svd_bytes
from projector.errors import BadParameter
from projector.laws.trial import merge
from projector.method import Contribution, Method, Totals
from projector.methods import make
from projector.methods.tsv_m import Triplets
from projector.spec import TensorSpec
from tests.oracles import rules, spectral

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]
Oracle = Callable[..., Mapping[str, Tensor]]

SHAPES = {
    "square.weight": (24, 24),
    "tall.weight": (40, 16),
    "wide.weight": (12, 36),
    "lora.weight": (48, 40),
    "experts.weight": (3, 10, 14),
    "word_embeddings.weight": (60, 8),
    "row.weight": (1, 9),
    "bias": (20,),
    "scalar": (),
}
MATRICES = ("square.weight", "tall.weight", "wide.weight", "lora.weight", "experts.weight")
COUNT = 12
ORDERS = 4  # random ones: what depends on the order shows in nearly any other
COUNTING = [0.5, 2.0, 1.0, 3.0, 1.0, 0.25, 1.0, 1.5, 1.0, 1.0, 0.75, 2.0]
DTYPES = [torch.float32, torch.bfloat16]

CASES: dict[str, tuple[str, dict[str, Any], Oracle, float]] = {
    "iso_c": ("iso_c", {}, spectral.iso_c, 1e-5),
    "iso_c 1.5": ("iso_c", {"scale": 1.5}, spectral.iso_c, 1e-5),
    "tsv_m": ("tsv_m", {}, spectral.tsv_m, 1e-5),
    "tsv_m 1.5": ("tsv_m", {"scale": 1.5}, spectral.tsv_m, 1e-5),
    "wudi": ("wudi", {}, spectral.wudi_ridge, 1e-5),
    "wudi adam": ("wudi", {"solver": "adam"}, spectral.wudi_adam, 1e-5),
    "wudi adam 1e-4": ("wudi", {"solver": "adam", "lr": 1e-4, "steps": 60}, spectral.wudi_adam, 1e-5),
    # up to 1 / tol = 20 times the rounding of the others: small directions are evened out
    "confluence": ("confluence", {}, spectral.confluence, 5e-5),
    "confluence 1.5": ("confluence", {"scale": 1.5, "ridge": 1e-2}, spectral.confluence, 5e-5),
    "ace": ("ace", {}, spectral.ace, 1e-5),
    "ace differing": ("ace", {"heterogeneity": 0.0, "eps": 1e-4}, spectral.ace, 1e-5),
    "ace never": ("ace", {"normalise": "never", "eps": 1e-5, "scale": 1.5}, spectral.ace, 1e-5),
    "ace always": ("ace", {"normalise": "always", "share": 0.6}, spectral.ace, 1e-5),
    "wudi 1e-4": ("wudi", {"ridge": 1e-4}, spectral.wudi_ridge, 1e-5),
}
cases = pytest.mark.parametrize("case", CASES)
subtractable = pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("tsv_m")])


def stream(dtype: torch.dtype = torch.float32, count: int = COUNT, seed: int = 3) -> tuple[Tensors, list[Tensors]]:
    """A base and experts that share a part of what they learnt; "lora.weight" moves by a matrix of rank 2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = {name: (0.1 * draw(*shape)).to(dtype) for name, shape in SHAPES.items()}
    common = {name: draw(*shape) for name, shape in SHAPES.items()}
    experts = []
    for _ in range(count):
        tau = {name: 0.01 * draw(*shape) + 0.004 * common[name] for name, shape in SHAPES.items()}
        m, n = SHAPES["lora.weight"]
        tau["lora.weight"] = 0.01 * draw(m, 2) @ draw(2, n)
        experts.append({name: (base[name].double() + tau[name]).to(dtype) for name in base})
    return base, experts


def method_of(case: str) -> tuple[Method, Callable[..., Mapping[str, Tensor]], float]:
    """The method, its oracle with the same parameters, and the relative error it may make."""
    name, params, oracle, tolerance = CASES[case]
    known = {key: value for key, value in params.items() if key != "solver"}
    return make(name, params), lambda *args: oracle(*args, **known), tolerance


def task_vector_of(method: Method, base: Tensors, state: Mapping[str, Tensor], totals: Totals) -> Tensors:
    """The merged task vector in float64, before it is added to the base and rounded."""
    merged = {}
    for name, theta0 in base.items():
        spec = TensorSpec(name, tuple(theta0.shape), theta0.dtype)
        slots = {key: state[f"{key}/{name}"] for key in method.slots(spec)}
        merged[name] = method.read(theta0.double(), slots, totals, spec) - theta0.double()
    return merged


def merged_task_vector(
    method: Method, base: Tensors, experts: Sequence[Tensors], counting: Sequence[float] | None = None
) -> Tensors:
    _, state, totals = merge(method, base, experts, counting=counting)
    return task_vector_of(method, base, state, totals)


def gap(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """||ours - theirs|| / ||theirs|| over all tensors taken as one vector."""
    assert ours.keys() == theirs.keys()
    apart = {name: tensor.double() - theirs[name].double() for name, tensor in ours.items()}
    return rules.norm(apart) / rules.norm(theirs)


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest `gap` of any one tensor."""
    return max(gap({name: tensor}, {name: theirs[name]}) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("dtype", "counting"),
    [
        pytest.param(torch.float32, None, id="equal"),
        pytest.param(torch.bfloat16, COUNTING, id="weighted, in half precision"),
        pytest.param(torch.float32, COUNTING, id="weighted", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, None, id="equal, in half precision", marks=pytest.mark.slow),
    ],
)
@cases
def test_twelve_arrivals_match_the_oracle(case: str, dtype: torch.dtype, counting: list[float] | None) -> None:
    method, oracle, tolerance = method_of(case)
    base, experts = stream(dtype)
    truth = oracle(base, experts, counting)
    weights, state, totals = merge(method, base, experts, counting=counting)
    error = worst(task_vector_of(method, base, state, totals), truth)
    print(f"{case} {dtype}: {error:.1e}")
    assert error <= tolerance
    for name, tensor in weights.items():
        exact = base[name].double() + truth[name]
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.double(), exact, rtol=torch.finfo(dtype).eps, atol=tolerance * 0.01), name


@pytest.mark.parametrize("case", ["wudi", "wudi adam", "wudi adam 1e-4"])
def test_what_wudi_adds_to_the_sum_matches_the_oracle(case: str) -> None:
    """A descent moves by little: beside the sum that it starts from, an error in it would hardly show."""
    method, oracle, tolerance = method_of(case)
    base, experts = stream()
    total, truth = rules.task_sum(base, experts), oracle(base, experts)
    ours = merged_task_vector(method, base, experts)
    error = worst({name: ours[name] - total[name] for name in MATRICES}, {n: truth[n] - total[n] for n in MATRICES})
    print(f"{case}: {error:.1e}")
    assert error <= tolerance


@cases
def test_random_orders_of_the_experts_give_the_same(case: str) -> None:
    method, _, _ = method_of(case)
    base, experts = stream()
    first = merged_task_vector(method, base, experts, COUNTING)
    shuffle, pairs, apart = random.Random(5), list(zip(experts, COUNTING, strict=True)), []
    for _ in range(ORDERS):
        shuffle.shuffle(pairs)
        apart.append(worst(merged_task_vector(method, base, *zip(*pairs, strict=True)), first))
    print(f"{case}: {max(apart):.1e}")
    assert 0 < max(apart) <= 1e-6


@subtractable
def test_experts_that_are_taken_out_leave_nothing(case: str) -> None:
    method, oracle, tolerance = method_of(case)
    base, experts = stream()
    gone = [2, 7, 11]
    counting = [*COUNTING, *(-COUNTING[i] for i in gone)]
    ours = merged_task_vector(method, base, [*experts, *(experts[i] for i in gone)], counting)
    kept = [i for i in range(COUNT) if i not in gone]
    truth = oracle(base, [experts[i] for i in kept], [COUNTING[i] for i in kept])
    assert worst(ours, truth) <= tolerance


@subtractable
def test_with_every_expert_taken_out_the_base_is_left(case: str) -> None:
    method, _, _ = method_of(case)
    base, experts = stream(count=3)
    weights, _, totals = merge(method, base, [*experts, *experts], counting=[1, 2, 3, -1, -2, -3])
    assert totals.experts == 0
    assert all(torch.equal(weights[name], base[name]) for name in base)


@subtractable
def test_a_matrix_whose_only_experts_were_taken_out_is_the_bases(case: str) -> None:
    """What rounding leaves of them is no Gram matrix, and has directions of its own."""
    method, _, _ = method_of(case)
    base, experts = stream(count=4)
    for expert in experts[3:]:
        expert["square.weight"] = base["square.weight"]
    counting = [0.3, 0.7, 1.1, 1, -0.3, -0.7, -1.1]
    ours = merged_task_vector(method, base, [*experts, *experts[:3]], counting)
    assert ours["square.weight"].abs().max() <= 1e-8
    assert ours["tall.weight"].abs().max() > 1e-3


@cases
def test_what_is_excluded_and_what_is_no_matrix_is_averaged(case: str) -> None:
    name, params, _, _ = CASES[case]
    base, experts = stream(count=3)
    ours = merged_task_vector(make(name, {**params, "exclude": "tall*"}), base, experts)
    mean = {name: tensor / 3 for name, tensor in rules.task_sum(base, experts).items()}
    for tensor in ("tall.weight", "row.weight", "bias", "scalar"):
        assert gap({tensor: ours[tensor]}, {tensor: mean[tensor]}) <= 1e-6, tensor
    for tensor in (*(name for name in MATRICES if name != "tall.weight"), "word_embeddings.weight"):
        assert gap({tensor: ours[tensor]}, {tensor: mean[tensor]}) > 0.1, tensor


def test_iso_c_has_a_flat_spectrum_and_the_sums_singular_vectors() -> None:
    base, experts = stream()
    ours, total = merged_task_vector(make("iso_c"), base, experts), rules.task_sum(base, experts)
    for name in ("square.weight", "tall.weight", "wide.weight"):
        values = torch.linalg.svdvals(total[name])
        assert torch.allclose(torch.linalg.svdvals(ours[name]), values.mean().expand_as(values), rtol=1e-6), name
        overlap = float((ours[name] * total[name]).sum() / values.mean())  # trace(V U' U S V')
        assert overlap == pytest.approx(float(values.sum()), rel=1e-6), name


@pytest.mark.parametrize("name", ["iso_c", "opcm"])
def test_directions_that_no_expert_moved_stay_empty(name: str) -> None:
    """Two experts of rank 2 have moved 4 of 40 directions: the mean is over 40, and only 4 carry it."""
    base, experts = stream(count=2)
    params = {"readout": "isotropic", "scale": 1.0} if name == "opcm" else {}
    method = make(name, {**params, "tol": 1e-4})  # above the rounding of the experts
    ours = merged_task_vector(method, base, experts)["lora.weight"]
    values = torch.linalg.svdvals(ours)
    assert torch.allclose(values[:4], values[0].expand(4), rtol=1e-5)
    assert (values[4:] <= 1e-5 * values[0]).all()
    if name == "iso_c":
        sums = torch.linalg.svdvals(rules.task_sum(base, experts)["lora.weight"])
        assert float(values[0]) == pytest.approx(float(sums.sum()) / 40, rel=1e-4)


@pytest.mark.parametrize("projection", ["code", "paper"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcm_read_out_isotropic_matches_the_oracle(dtype: torch.dtype, projection: str) -> None:
    """Without the low-rank matrix: twelve arrivals amplify the oracle's own rounding there, from 1e-15 to 4e-3.

    For the same reason the oracle has the task vectors that the method is given, which are rounded to float32.
    """
    base, experts = stream(dtype)
    for tensors in (base, *experts):
        del tensors["lora.weight"]
    method = make("opcm", {"readout": "isotropic", "scale": 1.5, "projection": projection})
    given = [
        {name: base[name] + (expert[name].float() - base[name].float()).double() for name in base} for expert in experts
    ]
    truth = spectral.opcm_isotropic(base, given, projection=projection, scale=1.5)
    error = gap(merged_task_vector(method, base, experts), truth)
    print(f"{dtype} {projection}: {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("accumulator", ["float32", "float64"])
def test_opcm_read_out_isotropic_is_right_for_the_state_on_disk(accumulator: str) -> None:
    base, experts = stream()
    method = make("opcm", {"readout": "isotropic", "accumulator": accumulator})
    _, state, totals = merge(method, base, experts)
    ours = task_vector_of(method, base, state, totals)
    lengthened = totals.scalars["mean_norm"] / totals.scalars["merged_norm"]
    for name, tensor in ours.items():
        a = state[f"A/{name}"].double()
        truth = a * lengthened
        if name in MATRICES:
            parts = [2.0 * spectral.flat(part, 1e-6) for part in (a if a.ndim == 3 else [a])]
            truth = torch.stack(parts).reshape(a.shape)
        error = gap({name: tensor}, {name: truth})
        print(f"{name} {accumulator}: {error:.1e}")
        assert error <= (1e-6 if accumulator == "float32" else 1e-7), name


def test_both_read_outs_of_opcm_share_a_state() -> None:
    base, experts = stream(torch.bfloat16, count=4)
    first, second = (merge(make("opcm", {"readout": word}), base, experts) for word in ("norm", "isotropic"))
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())
    assert first[2] == second[2]
    assert not torch.allclose(first[0]["square.weight"], second[0]["square.weight"], rtol=1e-2)
    assert torch.equal(first[0]["bias"], second[0]["bias"])


def test_ace_divides_by_traces_where_experts_differ_and_not_elsewhere() -> None:
    """The same experts once more, every other one moved a thousandth as far."""
    base, experts = stream()
    far = [
        {name: base[name] + (expert[name] - base[name]) * (1.0 if i % 2 else 1e-3) for name in base}
        for i, expert in enumerate(experts)
    ]
    for given, told in ((experts, "never"), (far, "always")):
        found = {word: merged_task_vector(make("ace", {"normalise": word}), base, given) for word in ("auto", told)}
        other = merged_task_vector(make("ace", {"normalise": "never" if told == "always" else "always"}), base, given)
        for name in MATRICES:
            assert torch.equal(found["auto"][name], found[told][name]), name
            assert gap({name: other[name]}, {name: found["auto"][name]}) > 0.01, name
        assert worst(found["auto"], spectral.ace(base, given)) <= 1e-5


def test_ace_takes_no_word_of_a_layer_from_an_expert_that_left_it_or_moved_all_rows_alike() -> None:
    base, experts = stream(count=4)
    experts[1]["square.weight"] = base["square.weight"] = torch.zeros(24, 24)
    experts[2]["square.weight"] = torch.linspace(-1, 1, 24).expand(24, 24).contiguous()
    for word in ("always", "never"):
        method = make("ace", {"normalise": word})
        ours = merged_task_vector(method, base, experts)["square.weight"]
        assert torch.equal(ours, merged_task_vector(method, base, [experts[0], experts[3]])["square.weight"])
        assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("solver", ["adam", "ridge"])
def test_wudi_lessens_the_loss_of_the_sum(solver: str) -> None:
    base, experts = stream()
    ours = merged_task_vector(make("wudi", {"solver": solver}), base, experts)
    total = rules.task_sum(base, experts)
    tasks = [rules.task_vector(base, expert) for expert in experts]
    weights = torch.ones(COUNT, dtype=torch.float64)
    for name in ("square.weight", "tall.weight", "wide.weight", "lora.weight"):
        taus = torch.stack([task[name] for task in tasks])
        after, before = (float(spectral.wudi_loss(m, taus, weights)) for m in (ours[name], total[name]))
        assert after < (0.95 if solver == "adam" else 0.5) * before, name


@pytest.mark.parametrize("params", [{"solver": "adam"}, {"solver": "adam", "lr": 1e-3}, {}, {"ridge": 1e3}], ids=str)
def test_wudi_takes_a_single_expert_whole(params: dict[str, Any]) -> None:
    base, experts = stream(count=1)
    ours = merged_task_vector(make("wudi", params), base, experts)
    assert worst(ours, rules.task_vector(base, experts[0])) <= 1e-6


@pytest.mark.parametrize("solver", ["adam", "ridge"])
def test_wudi_leaves_a_single_expert_whole_once_another_is_taken_out(solver: str) -> None:
    """Adam would take the rounding that is left for a gradient, and move each weight by lr at every step."""
    base, experts = stream(count=2)
    ours = merged_task_vector(make("wudi", {"solver": solver}), base, [*experts, experts[1]], [1.0, 0.7, -0.7])
    truth = rules.task_vector(base, experts[0])
    assert worst({name: ours[name] for name in MATRICES}, {name: truth[name] for name in MATRICES}) <= 1e-6


def test_opcm_takes_no_lower_tol_than_isotropic_is_good_for() -> None:
    make("opcm", {"tol": 0})
    make("opcm", {"tol": 1e-6, "readout": "isotropic"})
    with pytest.raises(BadParameter, match=r"tol cannot be 1e-07 .* isotropic") as caught:
        make("opcm", {"tol": 1e-7, "readout": "isotropic"})
    assert "1e-06 to 0.1" in caught.value.hint
    with pytest.raises(BadParameter, match="tol"):
        make("iso_c", {"tol": 1e-7})


@pytest.mark.parametrize("tol", [1e-6, 1e-1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_iso_c_matches_the_oracle_at_either_end_of_tol(tol: float, dtype: torch.dtype) -> None:
    """The oracle has the task vectors that the method is given: those of low rank are not, once rounded to float32."""
    base, experts = stream(dtype, count=2)
    given = [{n: base[n] + (e[n].float() - base[n].float()).double() for n in base} for e in experts]
    ours = merged_task_vector(make("iso_c", {"tol": tol}), base, experts)
    assert worst(ours, spectral.iso_c(base, given, tol=tol)) <= 1e-5


def test_wudi_declares_what_its_solvers_take() -> None:
    """Three squares: G ridged, its factor, and a solver's copy."""
    spec = TensorSpec("w.weight", (256, 4096), torch.float32)
    assert make("wudi").workspace(spec) >= 3 * 8 * 4096**2


def test_tsv_m_declares_all_triplets_that_are_there_at_a_time() -> None:
    """Of a wide matrix: the newcomer's, the first of them, both experts' side by side, and those in their order."""
    spec = TensorSpec("w.weight", (64, 16384), torch.float32)
    method, made = make("tsv_m"), 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            found = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.cat) and len(found) > 1:
                made += found.nbytes
            return found

    state = {key: torch.zeros(slot.shape) for key, slot in method.slots(spec).items()}
    triplets = Triplets.of(torch.randn(spec.shape), 1.0)
    with Counting():
        triplets.first(64).beside(Triplets(*(state[key] for key in ("L", "R", "s", "place"))).first(64))
    assert method.workspace(spec) - svd_bytes(spec.shape) >= made + sum(part.nbytes for part in triplets._parts()[:2])


@pytest.mark.parametrize("solver", ["adam", "ridge"])
def test_wudi_skips_a_task_vector_of_zero(solver: str) -> None:
    base, experts = stream(count=4)
    for expert in experts[1:3]:
        expert["square.weight"] = base["square.weight"]
    method = make("wudi", {"solver": solver})
    four = merged_task_vector(method, base, experts)
    two = merged_task_vector(method, base, [experts[0], experts[3]])
    assert torch.equal(four["square.weight"], two["square.weight"])
    assert not torch.equal(four["tall.weight"], two["tall.weight"])


def test_wudi_keeps_its_sums_in_any_order() -> None:
    """G and H are float64, so that the order shows in S, the float32 sum."""
    base, experts = stream()
    _, one, _ = merge(make("wudi"), base, experts, counting=COUNTING)
    _, other, _ = merge(make("wudi"), base, experts[::-1], counting=COUNTING[::-1])
    for name, tensor in one.items():
        assert gap({name: tensor}, {name: other[name]}) <= (1e-6 if name.startswith("S/") else 1e-14), name


def test_an_expert_of_weight_two_is_two_of_its_kind() -> None:
    base, experts = stream(count=3)
    for case in (case for case in CASES if not case.startswith("tsv_m")):
        method, _, _ = method_of(case)
        doubled = merged_task_vector(method, base, experts, [1.0, 2.0, 1.0])
        twice = merged_task_vector(method, base, [*experts, experts[1]])
        assert worst(doubled, twice) <= 1e-6, case


def test_wudi_merges_a_stack_matrix_by_matrix() -> None:
    base, experts = stream(count=3)
    method, name = make("wudi"), "experts.weight"
    stacked = merged_task_vector(method, base, experts)[name]
    spec = TensorSpec("one.weight", SHAPES[name][1:], torch.float32)
    for k in range(SHAPES[name][0]):
        state = {key: torch.zeros(slot.shape, dtype=slot.dtype) for key, slot in method.slots(spec).items()}
        for index, expert in enumerate(experts, start=1):
            state = dict(method.update(state, (expert[name] - base[name])[k], spec, Contribution(index))[0])
        alone = method.read(torch.zeros(spec.shape, dtype=torch.float64), state, Totals(3), spec)
        assert torch.equal(stacked[k], alone)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 13, 20, 25])
def test_tsv_m_keeps_of_any_number_of_experts_what_the_offline_method_keeps(count: int) -> None:
    """Up to 25 experts for sides of 10 to 40: some matrices have more experts than triplets."""
    base, experts = stream(count=count, seed=7)
    counting = [COUNTING[i % COUNT] for i in range(count)]
    error = worst(merged_task_vector(make("tsv_m"), base, experts, counting), spectral.tsv_m(base, experts, counting))
    print(f"{count}: {error:.1e}")
    assert error <= 1e-6


def test_tsv_m_has_the_same_bits_in_any_order() -> None:
    base, experts = stream(count=9)
    first = merge(make("tsv_m"), base, experts, counting=COUNTING[:9])[1]
    shuffle, pairs = random.Random(5), list(zip(experts, COUNTING, strict=False))
    for _ in range(ORDERS):
        shuffle.shuffle(pairs)
        weights = [weight for _, weight in pairs]
        state = merge(make("tsv_m"), base, [expert for expert, _ in pairs], counting=weights)[1]
        for key, tensor in state.items():
            assert key.startswith("S/") or torch.equal(tensor, first[key]), key


def test_tsv_m_keeps_an_adapter_whole_while_its_rank_fits() -> None:
    """Of 40 triplets each of four experts may keep ten, and two is all that the adapters have."""
    base, experts = stream(count=4)
    state = merge(make("tsv_m"), base, experts)[1]
    assert int(state["s/lora.weight"].count_nonzero()) == 8
    sizes = [torch.linalg.svdvals((e["lora.weight"] - base["lora.weight"]).double())[:2] for e in experts]
    assert torch.allclose(state["s/lora.weight"][0, :8].double(), torch.cat(sizes).sort(descending=True).values)


def test_tsv_m_gives_one_expert_whole_and_equal_experts_their_direction() -> None:
    """Two that are the same share every direction: the orthonormal factor has it once, with a size that is finite."""
    base, experts = stream(count=1)
    truth = rules.task_vector(base, experts[0])
    assert worst(merged_task_vector(make("tsv_m"), base, experts), truth) <= 1e-6
    twice = merged_task_vector(make("tsv_m"), base, [experts[0], experts[0]])
    for name in MATRICES:
        assert twice[name].isfinite().all() and twice[name].norm() <= 1.01 * truth[name].norm(), name


def test_confluence_hears_whole_experts_that_have_much_in_common() -> None:
    """Their own parts in what is merged are, added up, as long as they are."""
    ours, taus = four_over_a_base_of(1e3)
    heard = sum(float((ours * tau).sum()) for tau in taus)
    assert heard == pytest.approx(sum(float(tau.square().sum()) for tau in taus), rel=1e-5)
    assert float(ours.norm()) < float(torch.stack(taus).norm())


def test_confluence_is_no_longer_than_experts_together_that_have_nothing_in_common_unless_the_base_is_long() -> None:
    lengths = []
    for size in (1.0, 2.1, 1e3):
        ours, taus = four_over_a_base_of(size, common=0.0)
        lengths.append(float(ours.norm() / torch.stack(taus).norm()))
    assert lengths[0] == pytest.approx(1, rel=1e-5) and 1 < lengths[1] < lengths[2]
    heard = sum(float((ours * tau).sum()) for tau in taus)
    assert heard == pytest.approx(sum(float(tau.square().sum()) for tau in taus), rel=1e-5), "whole, beside a long base"


def test_confluence_nears_the_sum_at_one_experts_length_the_longer_experts_are_beside_the_base() -> None:
    lengths, cosines = [], []
    for size in (1e3, 1.0, 0.32, 0.28, 0.2, 0.0):
        ours, taus = four_over_a_base_of(size)
        total = torch.stack(taus).sum(0)
        lengths.append(float(ours.norm()))
        cosines.append(float((ours * total).sum() / ours.norm() / total.norm()))
    assert lengths[1] == pytest.approx(lengths[0]) and cosines[1] == pytest.approx(cosines[0])
    assert cosines[1] < cosines[2] < cosines[3] < cosines[4] == pytest.approx(1)
    assert lengths[1] > lengths[2] > lengths[3] > lengths[4] == pytest.approx(lengths[5])
    one = float(torch.stack(taus).norm()) / len(taus) ** 0.5
    assert float((ours - one * total / total.norm()).norm()) <= 1e-5 * one


@pytest.mark.parametrize("common", [0.5, 0.0])
@pytest.mark.parametrize("size", [1e2, 2.2, 2.1, 1.0, 0.32, 0.28, 0.2, 0.0])
def test_confluence_is_its_rule_however_long_the_experts_are_beside_the_base(size: float, common: float) -> None:
    """Of those that changed a matrix: the last one left it as it was."""
    generator = torch.Generator().manual_seed(4)
    base = {"weight": size * torch.randn(24, 16, generator=generator)}
    experts = [{"weight": base["weight"] + 0.1 * tau} for tau in torch.randn(4, 24, 16, generator=generator) + common]
    experts.append({"weight": base["weight"].clone()})
    weighing = [2.0, 1.0, 0.5, 1.0, 3.0]
    ours = merged_task_vector(make("confluence"), base, experts, counting=weighing)
    assert worst(ours, spectral.confluence(base, experts, weighing)) <= 5e-5


def four_over_a_base_of(size: float, common: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """(what confluence adds to a base of elements of that size, and the task vectors, which share so much)."""
    generator = torch.Generator().manual_seed(4)
    shared, base, *own = torch.randn(6, 24, 16, generator=generator, dtype=torch.float64)
    base, taus = size * base, [0.1 * (common * shared + one) for one in own]
    experts = [{"weight": base + tau} for tau in taus]
    return merged_task_vector(make("confluence"), {"weight": base}, experts)["weight"], taus


def test_confluence_leaves_a_single_expert_as_it_is() -> None:
    base, experts = stream(count=1)
    ours = merged_task_vector(make("confluence"), base, experts)
    assert worst(ours, rules.task_vector(base, experts[0])) <= 1e-5


def test_confluence_takes_experts_that_do_not_meet_as_they_are() -> None:
    """Of other inputs: nothing is evened out, as it is where they are random."""
    base, (expert,) = stream(count=1)
    name = "square.weight"
    tau = expert[name].double() - base[name].double()
    half = torch.arange(tau.shape[1]) % 2 == 0
    parts = [{**base, name: (base[name] + tau * columns).to(base[name].dtype)} for columns in (half, ~half)]
    assert worst({name: merged_task_vector(make("confluence"), base, parts)[name]}, {name: tau}) <= 1e-5
    other = stream(count=2)[1][1]
    met = merged_task_vector(make("confluence"), base, [expert, other])[name]
    assert gap({name: met}, {name: tau + other[name].double() - base[name].double()}) > 0.1


def test_confluence_keeps_nothing_of_a_vocabularys_size_squared() -> None:
    """The output layer of a Llama with 8 billion parameters would take 130 GB; it is merged by its inputs alone."""
    taus = 0.01 * torch.randn(3, 90, 10, generator=torch.Generator().manual_seed(1))
    base, name = {"lm_head.weight": torch.zeros(90, 10)}, "lm_head.weight"
    experts = [{name: tau} for tau in taus]
    method = make("confluence")
    assert worst(merged_task_vector(method, base, experts), spectral.confluence(base, experts)) <= 5e-5
    llama = TensorSpec(name, (128256, 4096), torch.bfloat16)
    assert max(slot.nbytes for slot in method.slots(llama).values()) == 8 * llama.numel
    assert method.workspace(llama) < 32 * llama.numel
    assert "L" in method.slots(TensorSpec(name, (80, 10), torch.float32))


def test_confluence_merges_little_of_experts_that_contradict_each_other() -> None:
    """The parts that are left of them are small, and would ask for any length."""
    base, (expert,) = stream(count=1)
    name = "square.weight"
    tau = expert[name].double() - base[name].double()
    for left in (0.0, 1e-3, 0.1):
        against = {key: tensor.clone() for key, tensor in base.items()}
        against[name] = (base[name].double() - (1 - left) * tau).to(base[name].dtype)
        merged = merged_task_vector(make("confluence"), base, [expert, against])[name]
        assert rules.norm({name: merged}) <= (4 * left + 1e-4) * rules.norm({name: tau})


def test_confluence_takes_experts_that_add_up_to_nothing() -> None:
    """What disturbs them least is more than nothing, and points as little to their sum as to anything."""
    name, half = "square.weight", torch.diag((torch.arange(24) < 12).float())
    zero = {key: torch.zeros_like(tensor) for key, tensor in stream(count=1)[0].items()}
    experts = [{**zero, name: tau} for tau in (half, torch.eye(24) - half, -torch.eye(24))]
    assert not merged_task_vector(make("confluence"), zero, experts)[name].any()
