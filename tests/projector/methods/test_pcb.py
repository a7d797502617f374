"""PCB-Merging, on arrival and in two passes, against its formula in float64."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from projector.driver.fold import Driver
from projector.driver.head import HeadFold
from projector.driver.steps import state_specs
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.laws.trial import Tensors, _Files, merge
from projector.method import Contribution, Totals
from projector.methods import make, methods
from projector.spec import TensorSpec
from tests.oracles.pcb import pcb, pcb_on_arrival

SHAPES = {"embed.weight": (50, 16), "up.weight": (64, 16), "down.weight": (16, 64), "norm": (16,), "temperature": ()}


def model(count: int, dtype: torch.dtype = torch.float32, size: float = 0.3) -> tuple[Tensors, list[Tensors]]:
    """A base and experts that are near it and, by half, near each other."""
    draw = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}
    common = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    experts: list[Tensors] = []
    for _ in range(count):
        own = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        experts.append({name: (base[name] + size * (common[name] + own[name])).to(dtype) for name in SHAPES})
    return base, experts


def twice(base: Tensors, experts: Sequence[Tensors], **params: float) -> dict[str, Tensor]:
    """Two passes, by the driver and through files; blocks of a few rows."""
    method = make("pcb", params)
    driver = Driver(block_bytes=2048)
    with _Files() as files:
        origin = Checkpoint([files.written(base)])
        state: TensorReader | None = None
        for one in (method, method.second_pass(len(experts))):
            assert one is not None
            totals = Totals()
            for index, weights in enumerate(experts, start=1):
                source = Checkpoint([files.written(weights)])
                view = driver.survey(origin, source, one, Contribution(index), state)
                fd = files.new()
                after = TensorWriter(fd, state_specs(one, origin.schema), {})
                totals = driver.fold(origin, source, [HeadFold(one, totals, view, state, after)]).totals[0]
                state = TensorReader(fd)
        assert totals.experts == len(experts)
        fd = files.new()
        out = TensorWriter(fd, list(origin.schema.values()), {})
        driver.read_out(origin, method, totals, state, [out])
        merged = TensorReader(fd)
        return {name: merged.read(name) for name in merged.specs}


def assert_near(found: Tensors, truth: Tensors, base: Tensors, tolerance: float) -> None:
    """Of the merged task vector as a whole, relative."""
    error = sum(float((found[n].double() - truth[n].double()).square().sum()) for n in truth) ** 0.5
    length = sum(float((truth[n].double() - base[n].double()).square().sum()) for n in truth) ** 0.5
    assert length > 0.1 and error <= tolerance * length, (error, length)


ratios = pytest.mark.parametrize(
    "ratio", [0.05, 0.5, 1.0, *(pytest.param(r, marks=pytest.mark.slow) for r in (0.1, 0.95))]
)


@ratios
def test_two_passes_are_the_offline_method(ratio: float) -> None:
    base, experts = model(12)
    assert_near(twice(base, experts, ratio=ratio, scale=1.2), pcb(base, experts, ratio, 1.2), base, 1e-5)


@ratios
def test_one_pass_is_the_method_with_the_sums_of_that_moment(ratio: float) -> None:
    base, experts = model(12)
    merged = merge(make("pcb", {"ratio": ratio}), base, experts)[0]
    assert_near(merged, pcb_on_arrival(base, experts, ratio), base, 1e-5)


def test_one_pass_is_not_the_offline_method() -> None:
    """It says of itself that it is approximate, and it is."""
    base, experts = model(12)
    with pytest.raises(AssertionError):
        assert_near(merge(make("pcb"), base, experts)[0], pcb(base, experts), base, 1e-2)
    assert methods()["pcb"].approximate


def test_the_first_expert_alone_is_exact() -> None:
    base, experts = model(1)
    once, both = merge(make("pcb"), base, experts)[0], twice(base, experts)
    assert all(torch.equal(once[name], both[name]) for name in once)
    assert_near(once, pcb(base, experts), base, 1e-6)


def test_two_passes_do_not_depend_on_the_order() -> None:
    base, experts = model(6)
    forward, backward = twice(base, experts), twice(base, experts[::-1])
    assert_near(backward, forward, base, 1e-5)


def test_a_bfloat16_base_is_rounded_once() -> None:
    base, experts = model(12, torch.bfloat16)
    truth = {name: tensor.to(torch.bfloat16) for name, tensor in pcb(base, experts).items()}
    found = twice(base, experts)
    same = sum(int((found[name] == truth[name]).sum()) for name in found)
    assert same >= 0.99 * sum(tensor.numel() for tensor in found.values())


def test_many_experts_do_not_overflow() -> None:
    """exp(T) alone would: float32 ends at exp(88), float64 at exp(709)."""
    method, spec = make("pcb"), TensorSpec("w", (1000,), torch.float32)
    delta = torch.linspace(-1.0, 1.0, 1000)
    state = {"S": 999 * delta, "shared": torch.zeros(1000), "shares": torch.zeros(1000)}
    expert = Contribution(1000)
    for _ in range(method.rounds):
        expert = replace(expert, surveys=(*expert.surveys, method.survey(state, delta, spec, expert)))
    after, _ = method.update(state, delta, spec, expert)
    assert after["shares"].isfinite().all() and after["shares"].max() == 1 and after["shared"].abs().max() > 0.9


def test_the_second_pass_is_no_method_to_choose() -> None:
    assert [cls.__name__ for name, cls in methods().items() if name == "pcb"] == ["Pcb"]
