"""OPCM as it streams, against the full singular value decomposition in float64, and that against the paper's recursion.

The method amplifies rounding: it removes the diagonal in the basis of single singular vectors, and those turn by
(rounding / gap) where singular values stand close, up to tenfold per arrival. So there are two yardsticks. One step,
from the very state that is on disk, must be right to 1e-6 whatever the spectrum; ten arrivals must be right to 1e-5.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from projector.algebra.linalg import EXCLUDED
from projector.driver.fold import Driver
from projector.driver.steps import prepared_specs
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.laws.trial import merge
from projector.method import Contribution, Totals
from projector.methods.opcm import Opcm
from projector.spec import TensorSpec
from tests.oracles import rules

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]

SHAPES = {
    "square.weight": (48, 48),
    "tall.weight": (96, 32),
    "wide.weight": (24, 80),
    "lora.weight": (64, 40),
    "experts.weight": (3, 20, 28),
    "word_embeddings.weight": (120, 16),
    "row.weight": (1, 9),
    "bias": (40,),
    "scalar": (),
}
COUNT = 10
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

ALPHAS = (0.0, 0.3, 0.5, 1.0)
settings = pytest.mark.parametrize(
    ("alpha", "projection"), [(alpha, word) for word in ("code", "paper") for alpha in ALPHAS]
)


def task_matrix(shape: tuple[int, ...], decay: float, generator: torch.Generator) -> Tensor:
    """Random singular vectors; the singular values fall from 1 to `decay` (1: a plain random matrix)."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if decay == 1 or x.ndim < 2:
        return x
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag_embed(torch.logspace(0, math.log10(decay), s.shape[-1], dtype=torch.float64) * 10) @ vh


def stream(
    base_dtype: torch.dtype = torch.float32,
    expert_dtype: torch.dtype | None = None,
    count: int = COUNT,
    decay: float = 1.0,
    seed: int = 1,
) -> tuple[Tensors, list[Tensors]]:
    """A base and experts with task vectors of a few per cent; "lora.weight" moves by a matrix of rank 2."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(base_dtype) for name, shape in SHAPES.items()}
    experts = []
    for _ in range(count):
        expert = {}
        for name, shape in SHAPES.items():
            tau = task_matrix(shape, decay, generator)
            if name == "lora.weight":
                tau = task_matrix((shape[0], 2), 1, generator) @ task_matrix((2, shape[1]), 1, generator)
            expert[name] = (base[name].double() + 0.03 * tau).to(expert_dtype or base_dtype)
        experts.append(expert)
    return base, experts


def deployed(state: Tensors, totals: Totals) -> Tensors:
    """The merged task vector before it is added to the base and rounded, in float64."""
    scale = totals.scalars["mean_norm"] / totals.scalars["merged_norm"]
    return {key.removeprefix("A/"): tensor.double() * scale for key, tensor in state.items()}


def gap(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """||ours - theirs|| / ||theirs|| over all tensors taken as one vector."""
    assert ours.keys() == theirs.keys()
    apart = {name: tensor.double() - theirs[name].double() for name, tensor in ours.items()}
    return rules.norm(apart) / rules.norm(theirs)


def in_each(dtypes: Sequence[torch.dtype]) -> list[Any]:
    """The first of these dtypes with every setting, the others with the defaults; all of them in the long run."""
    every = [(dtype, alpha, word) for dtype in dtypes for word in ("code", "paper") for alpha in ALPHAS]
    return [
        pytest.param(*one, marks=[] if one[0] is dtypes[0] or one[1:] == (0.5, "code") else pytest.mark.slow)
        for one in every
    ]


@pytest.mark.parametrize(("base_dtype", "alpha", "projection"), in_each(DTYPES))
def test_ten_arrivals_match_the_oracle(base_dtype: torch.dtype, alpha: float, projection: str) -> None:
    base, experts = stream(base_dtype)
    weights, state, totals = merge(Opcm(alpha=alpha, projection=projection), base, experts)
    truth = rules.opcm(base, experts, alpha=alpha, projection=projection)
    ours, theirs = deployed(state, totals), {name: truth[name] - base[name].double() for name in base}
    error = gap(ours, theirs)
    print(f"{base_dtype} alpha {alpha} {projection}: {error:.1e}")
    assert error <= 1e-5
    for name, tensor in weights.items():
        assert gap({name: ours[name]}, {name: theirs[name]}) <= 3e-5, name
        assert torch.allclose(tensor.double(), truth[name], rtol=torch.finfo(base_dtype).eps, atol=1e-5), name


@pytest.mark.parametrize("base_dtype", DTYPES[:2], ids=str)
def test_ten_arrivals_that_remove_only_what_leads_match_the_oracle(base_dtype: torch.dtype) -> None:
    base, experts = stream(base_dtype)
    _, state, totals = merge(Opcm(projection="lead"), base, experts)
    truth = rules.opcm(base, experts, projection="lead")
    error = gap(deployed(state, totals), {name: truth[name] - base[name].double() for name in base})
    print(f"{base_dtype}: {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("alpha", ALPHAS)
def test_what_is_added_where_only_what_leads_is_removed_is_orthogonal_to_what_is_merged(alpha: float) -> None:
    base, experts = stream(torch.bfloat16, decay=1.0)
    method = Opcm(alpha=alpha, projection="lead")
    assert worst_step(method, base, experts[:5]) <= 1e-6
    for name in ("square.weight", "tall.weight", "wide.weight"):
        spec = TensorSpec(name, SHAPES[name], torch.bfloat16)
        one, two = ((expert[name].double() - base[name].double()).float() for expert in experts[:2])
        before = {"A": one.double()}
        state, _ = method.update({**before, **method.prepare(before, spec)}, two, spec, Contribution(2))
        added = state["A"] - before["A"]
        along = [float((x * before["A"]).sum() / two.norm() / before["A"].norm()) for x in (added, two)]
        assert abs(along[0]) <= 1e-12 < 1e-3 < abs(along[1]), name


def test_removing_only_what_leads_costs_a_fraction_of_the_products_and_of_what_is_prepared() -> None:
    shape = (480, 400)
    spec, generator = TensorSpec("w.weight", shape, torch.bfloat16), torch.Generator().manual_seed(3)
    merged, expert = (task_matrix(shape, 1, generator) for _ in range(2))
    flops, prepared = [], []
    for projection in ("lead", "code"):
        method = Opcm(projection=projection)
        ready = method.prepare({"A": merged}, spec)
        with FlopCounterMode(display=False) as counter:
            method.update({"A": merged, **ready}, expert.float(), spec, Contribution(2))
        flops.append(counter.get_total_flops())
        prepared.append(ready["left"].numel())
    print(flops, prepared)
    assert flops[0] <= flops[1] / 3 and prepared[0] <= prepared[1] / 3


def test_float32_accumulators_are_half_the_size_and_drift() -> None:
    """Low-rank experts in bfloat16 leave a floor of close singular values, the worst there is."""
    base, experts = stream(torch.bfloat16)
    truth = rules.opcm(base, experts)
    theirs = {name: truth[name] - base[name].double() for name in base}
    errors, sizes = [], []
    for accumulator in ("float64", "float32"):
        _, state, totals = merge(Opcm(accumulator=accumulator), base, experts)
        errors.append(gap(deployed(state, totals), theirs))
        sizes.append(state["A/lora.weight"].nbytes)
    assert sizes[0] == 2 * sizes[1]
    assert errors[0] <= 1e-5 < errors[1] <= 0.2


@pytest.mark.parametrize(
    ("decay", "projection"),
    [
        (1.0, "code"),
        (1e-3, "paper"),
        pytest.param(1.0, "paper", marks=pytest.mark.slow),
        pytest.param(1e-3, "code", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("expert_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
def test_each_step_is_right_whatever_the_dtypes_and_the_spectrum(
    base_dtype: torch.dtype, expert_dtype: torch.dtype, decay: float, projection: str
) -> None:
    base, experts = stream(base_dtype, expert_dtype, decay=decay)
    assert worst_step(Opcm(projection=projection), base, experts) <= 1e-6


@settings
def test_each_step_is_right_for_each_alpha(alpha: float, projection: str) -> None:
    base, experts = stream(decay=1.0)
    assert worst_step(Opcm(alpha=alpha, projection=projection), base, experts) <= 1e-6


def worst_step(method: Opcm, base: Tensors, experts: list[Tensors]) -> float:
    """The largest relative error of any tensor's A_t, where both sides start from the same A_{t-1}."""
    worst = 0.0
    for name, theta0 in base.items():
        spec = TensorSpec(name, tuple(theta0.shape), theta0.dtype)
        old = torch.zeros(spec.shape, dtype=method.slots(spec)["A"].dtype)
        for index, expert in enumerate(experts, start=1):
            tau = expert[name].double() - theta0.double()
            before = {"A": old}
            state, _ = method.update({**before, **method.prepare(before, spec)}, tau.float(), spec, Contribution(index))
            new, truth = state["A"], old.double() + oracle_step(method, name, tau, old.double())
            worst = max(worst, gap({name: new}, {name: truth}))
            old = new
    return worst


def oracle_step(method: Opcm, name: str, tau: Tensor, old: Tensor) -> Tensor:
    """P(tau; A) by the oracle, in float64."""
    if not rules.is_projected(name, tau, method.exclude):
        return tau
    pairs = zip(tau, old, strict=True) if tau.ndim == 3 else [(tau, old)]
    parts = [rules.project(one, before, method.alpha, method.projection, method.tol) for one, before in pairs]
    return torch.stack(parts) if tau.ndim == 3 else parts[0]


@settings
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(160, 200), (240, 160), (6, 40)], ids=str)
def test_an_adapters_factors_are_projected_as_its_delta_is(
    shape: tuple[int, int], base_dtype: torch.dtype, alpha: float, projection: str
) -> None:
    """Eight adapters of rank 2: A's own rank is low at first, and then not for a sketch (and never for a small A)."""
    method, spec = Opcm(alpha=alpha, projection=projection), TensorSpec("w.weight", shape, base_dtype)
    generator = torch.Generator().manual_seed(3)
    old = torch.zeros(shape, dtype=method.slots(spec)["A"].dtype)
    for index in range(1, 9):
        up, down = (task_matrix(side, 1, generator) for side in ((shape[0], 2), (2, shape[1])))
        before = {"A": old}
        state, _ = method.update(
            {**before, **method.prepare(before, spec)},
            (up @ down).float(),
            spec,
            Contribution(index, factors=(up, down)),
        )
        truth = old.double() + oracle_step(method, spec.name, up @ down, old.double())
        assert gap({"A": state["A"]}, {"A": truth}) <= 1e-6, index
        old = state["A"]


def test_a_task_vector_that_spares_the_first_row_is_projected() -> None:
    method, spec = Opcm(), TensorSpec("w.weight", (16, 24), torch.float32)
    generator = torch.Generator().manual_seed(3)
    old, tau = (task_matrix((16, 24), 1, generator).float() for _ in range(2))
    tau[0] = 0
    state, _ = method.update({"A": old, **method.prepare({"A": old}, spec)}, tau, spec, Contribution(2))
    truth = old.double() + oracle_step(method, spec.name, tau.double(), old.double())
    assert gap({"A": state["A"]}, {"A": truth}) <= 1e-6 < gap({"A": old + tau}, {"A": truth})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_adapters_alone_make_stays_of_low_rank(dtype: torch.dtype) -> None:
    """Also for a float64 A, where the first of them counts: its delta, rounded to float32, has every direction."""
    method, spec = Opcm(), TensorSpec("w.weight", (480, 400), dtype)
    generator = torch.Generator().manual_seed(3)
    merged = torch.zeros(spec.shape, dtype=method.slots(spec)["A"].dtype)
    for index in range(1, 6):
        up, down = (task_matrix(side, 1, generator) for side in ((480, 4), (4, 400)))
        with FlopCounterMode(display=False) as counter:
            ready = {"A": merged, **method.prepare({"A": merged}, spec)}
        assert counter.get_total_flops() <= 2 * 480 * 400 * 400 / 2, index
        assert ready["left"].numel() == 480 * 4 * (index - 1)
        state, _ = method.update(ready, (up @ down).float(), spec, Contribution(index, factors=(up, down)))
        merged = state["A"]


@pytest.mark.parametrize("projection", ["code", "paper"])
def test_an_adapter_costs_what_its_rank_and_what_is_merged_cost(projection: str) -> None:
    """Flops of one arrival of rank 4, after three of rank 4 and after a full expert, against a full one's."""
    shape = (480, 400)
    method, spec = Opcm(projection=projection), TensorSpec("w.weight", shape, torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    up, down = (task_matrix(side, 1, generator) for side in ((shape[0], 4), (4, shape[1])))
    low, whole = (
        task_matrix((shape[0], 12), 1, generator) @ task_matrix((12, shape[1]), 1, generator),
        task_matrix(shape, 1, generator),
    )

    def flops(merged: Tensor, expert: Contribution) -> int:
        state = {"A": merged, **method.prepare({"A": merged}, spec)}
        with FlopCounterMode(display=False) as counter:
            method.update(state, (up @ down).float(), spec, expert)
        return counter.get_total_flops()

    full = flops(whole, Contribution(2))
    assert flops(whole, Contribution(2, factors=(up, down))) <= 0.6 * full  # what is removed has every direction of A
    assert flops(low, Contribution(2, factors=(up, down))) <= 0.06 * full


def test_of_what_is_prepared_only_the_directions_that_are_there_are_kept(tmp_path: Path) -> None:
    method, shape = Opcm(), (24, 16)
    generator = torch.Generator().manual_seed(3)
    merged = task_matrix((24, 3), 1, generator) @ task_matrix((3, 16), 1, generator)
    save_file({"w": torch.zeros(shape, dtype=torch.bfloat16)}, tmp_path / "base")
    save_file({"A/w": merged}, tmp_path / "state")
    with (
        (tmp_path / "base").open("rb") as base,
        (tmp_path / "state").open("rb") as state,
        (tmp_path / "prepared").open("w+b") as file,
    ):
        origin = Checkpoint([TensorReader(base.fileno())])
        writer = TensorWriter(file.fileno(), prepared_specs(method, origin.schema), {})
        assert list(Driver().prepare(origin, method, TensorReader(state.fileno()), writer, ["w"])) == ["w"]
        digest = writer.finish()  # what is left out reads as zeros
        kept = TensorReader(file.fileno())
        assert kept.read("rows/w").tolist() == [24 * 3, 16 * 3, 16]
        left, right = (
            kept.read(f"{key}/w", slice(0, side * 3)).view(side, 3)
            for key, side in zip(("left", "right"), shape, strict=True)
        )
        assert torch.allclose(left * kept.read("values/w")[:3] @ right.T, merged, rtol=0, atol=1e-12)
        assert not kept.read("left/w", slice(24 * 3, 24 * 16)).any()
    assert hashlib.sha256((tmp_path / "prepared").read_bytes()).hexdigest() == digest


def test_published_weights_in_low_precision_are_rounded_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        base, experts = stream(dtype, torch.float32)
        weights, state, totals = merge(Opcm(), base, experts)
        ours = deployed(state, totals)
        for name, tensor in weights.items():
            assert tensor.dtype == dtype
            exact = (tensor == (base[name].double() + ours[name]).to(dtype)).double().mean()
            assert exact >= 0.99, f"{name} in {dtype}: {exact}"


def test_after_each_arrival_the_figures_are_the_oracles() -> None:
    base, experts = stream(count=4)
    for count in range(1, 5):
        _, state, totals = merge(Opcm(), base, experts[:count])
        norms = [rules.norm(rules.task_vector(base, expert)) for expert in experts[:count]]
        figures = Opcm().figures(totals)
        assert totals.experts == count
        assert figures["mean_norm"] == pytest.approx(sum(norms) / count, rel=1e-6)
        assert figures["merged_norm"] == pytest.approx(rules.norm(state), rel=1e-9)
        assert figures["lambda"] == pytest.approx(figures["merged_norm"] / figures["mean_norm"], rel=1e-12)
        assert rules.norm(deployed(state, totals)) == pytest.approx(figures["mean_norm"], rel=1e-9)


def test_the_first_expert_is_taken_whole() -> None:
    base, experts = stream(count=1)
    weights, state, totals = merge(Opcm(alpha=1.0), base, experts)
    for name, tensor in experts[0].items():
        assert torch.equal(state[f"A/{name}"].float(), tensor - base[name])
        assert torch.allclose(weights[name], tensor, rtol=2e-7, atol=1e-7)
    assert Opcm().figures(totals)["lambda"] == pytest.approx(1.0, rel=1e-9)


def test_a_tensor_that_no_expert_trained_stays_and_is_whole_when_one_does() -> None:
    base, experts = stream(count=3)
    for expert in experts[:2]:
        expert["square.weight"] = base["square.weight"]
    weights, _, _ = merge(Opcm(), base, experts[:2])
    assert torch.equal(weights["square.weight"], base["square.weight"])
    _, state, _ = merge(Opcm(), base, experts)
    assert torch.equal(state["A/square.weight"].float(), experts[2]["square.weight"] - base["square.weight"])


def test_what_is_excluded_and_what_is_no_matrix_is_summed() -> None:
    base, experts = stream(count=3)
    _, state, _ = merge(Opcm(exclude=("tall*",)), base, experts)
    total = rules.task_sum(base, experts)
    for name in ("tall.weight", "row.weight", "bias", "scalar"):
        assert torch.allclose(state[f"A/{name}"].double(), total[name], rtol=1e-5, atol=1e-6), name
    for name in ("square.weight", "word_embeddings.weight", "experts.weight"):
        assert not torch.allclose(state[f"A/{name}"].double(), total[name], rtol=1e-2, atol=1e-3), name


def test_a_rank_deficient_sum_gives_the_same_bits_each_time() -> None:
    base, experts = stream(count=5)
    first, second = (merge(Opcm(alpha=1.0), base, experts)[1] for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_alpha_one_protects_everything_that_was_merged() -> None:
    """With A of full rank and alpha 1, "code" leaves of a square update only what lies outside U and V: nothing."""
    base, experts = stream(count=2)
    _, state, _ = merge(Opcm(alpha=1.0), base, experts)
    first = (experts[0]["square.weight"] - base["square.weight"]).double()
    assert gap({"w": state["A/square.weight"].double()}, {"w": first}) <= 1e-5


@settings
def test_the_oracle_is_the_papers_recursion(alpha: float, projection: str) -> None:
    """Without the low-rank matrix: what lies outside its span is rounding, and differs between the two forms."""
    base, experts = stream(count=5)
    base64 = {name: tensor.double() for name, tensor in base.items() if name != "lora.weight"}
    experts64 = [{name: expert[name].double() for name in base64} for expert in experts]
    truth = rules.opcm(base64, experts64, alpha=alpha, projection=projection)
    theirs = recursion(base64, experts64, alpha, projection)
    error = gap(*({name: weights[name] - base64[name] for name in base64} for weights in (theirs, truth)))
    print(f"alpha {alpha} {projection}: {error:.1e}")
    assert error <= 1e-11


def recursion(base: Tensors, experts: list[Tensors], alpha: float, projection: str) -> Tensors:
    """The paper's own form, float64: theta_t = theta_0 + (lambda_{t-1} Delta_{t-1} + P(tau_t; Delta_{t-1})) / lambda_t.

    Delta_{t-1} = theta_{t-1} - theta_0 is taken from the rescaled weights; lambda_t gives the merged task vector the
    mean norm of the task vectors so far.
    """
    theta = experts[0]
    mean_norm = rules.norm({name: theta[name] - base[name] for name in base})
    lam = 1.0
    for t, expert in enumerate(experts[1:], start=2):
        tau = {name: expert[name] - base[name] for name in base}
        mean_norm += (rules.norm(tau) - mean_norm) / t
        step = {}
        for name in base:
            delta = theta[name] - base[name]
            step[name] = lam * delta + without_the_merged(name, tau[name], delta, alpha, projection)
        lam = rules.norm(step) / mean_norm
        theta = {name: base[name] + step[name] / lam for name in base}
    return theta


def without_the_merged(name: str, tau: Tensor, delta: Tensor, alpha: float, projection: str) -> Tensor:
    """P(tau; delta), matrix by matrix, as a sum over pairs of singular vectors that are allowed to stay."""
    if tau.ndim == 3:
        pairs = zip(tau, delta, strict=True)
        return torch.stack([without_the_merged(name, one, before, alpha, projection) for one, before in pairs])
    if tau.ndim != 2 or 1 in tau.shape or any(fnmatchcase(name, glob) for glob in EXCLUDED):
        return tau
    u, s, vh = torch.linalg.svd(delta, full_matrices=True)
    mass, rank, total = 0.0, 0, float(s.sum())
    while rank < len(s) and (mass + float(s[rank]) <= alpha * total if projection == "code" else mass < alpha * total):
        mass += float(s[rank])
        rank += 1
    if alpha == 1:  # everything, whatever the sum of shares rounds to
        rank = len(s)
    stays = torch.ones(tau.shape, dtype=torch.float64)
    stays.fill_diagonal_(0)
    if projection == "code":
        stays[:rank, :rank] = 0
    else:
        stays[:rank] = 0
        stays[:, :rank] = 0
    return u @ (stays * (u.T @ tau @ vh.T)) @ vh


def test_the_projection_takes_a_good_part_of_an_expert() -> None:
    """Otherwise the comparisons above would compare sums."""
    base, experts = stream()
    _, state, _ = merge(Opcm(), base, experts)
    total = rules.task_sum(base, experts)
    for name in ("square.weight", "tall.weight", "wide.weight", "lora.weight", "experts.weight"):
        assert gap({name: state[f"A/{name}"]}, {name: total[name]}) > 0.05, name
