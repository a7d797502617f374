"""The laws that every merging method obeys, for ours and for third parties' alike.

    from projector.laws import LAWS

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
    def test_my_method(law):
        law(MyMethod())

A law raises AssertionError with what was broken, or lets through the error that the method or the driver raised. It
runs the method as the driver does, on small seeded tensors.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isclose, isfinite

import torch
from torch import Tensor

from projector.algebra.linalg import energy
from projector.driver.fold import Driver
from projector.laws.trial import Tensors, merge, sidecar, stream, views
from projector.method import Contribution, Method, Totals
from projector.spec import TensorSpec

Law = Callable[[Method], None]


def no_expert_reads_the_base(method: Method) -> None:
    """With no expert folded the weights are the base's."""
    base, _ = stream(0)
    _assert_same(merge(method, base, [])[0], base)


def zero_delta_is_harmless(method: Method) -> None:
    """An expert equal to the base, first or later, leaves everything finite, and alone it changes nothing."""
    base, experts = stream(2)
    _assert_same(merge(method, base, [base])[0], base)
    for tensors in (merge(method, base, [base, *experts]), merge(method, base, [*experts, base])):
        assert all(tensor.isfinite().all() for tensor in tensors[0].values())


def arguments_are_never_mutated(method: Method) -> None:
    """Neither prepare, update nor read changes a tensor it was given."""
    for spec, base, deltas in _tensors():
        state = _zeros(method, spec)
        for index, delta in enumerate(deltas, start=1):
            expert = _surveyed(method, state, spec, delta, index)
            given = {"delta": delta, **_ready(method, state, spec, base)}
            before = {key: value.clone() for key, value in given.items()}
            state, sums = method.update(given, delta, spec, expert)
            _assert_same(given, before)
        totals = method.tally(Totals(), {**sums, "task_vector": energy(delta)}, expert)
        given = {"base": base, **state}
        before = {key: value.clone() for key, value in given.items()}
        method.read(base, state, totals, spec)
        _assert_same(given, before)
        if method.keeps(spec):
            given = {"delta": delta, "base": base, **state}
            before = {key: value.clone() for key, value in given.items()}
            record = method.keep(delta, spec, expert)
            method.view(base, state, record, method.view_sums(state, record, spec), spec)
            _assert_same(given, before)


def same_input_same_bits(method: Method) -> None:
    """The same stream twice gives the same bits, for weights and state."""
    base, experts = stream(3)
    first, second = merge(method, base, experts), merge(method, base, experts)
    _assert_same(first[0], second[0])
    _assert_same(first[1], second[1])
    assert first[2] == second[2], "totals differ"


def state_has_constant_size(method: Method) -> None:
    """Over 50 updates the state keeps its keys, shapes and dtypes, and the totals their number."""
    spec = TensorSpec("square.weight", (8, 8), torch.float32)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(spec.shape, generator=generator)
    state, totals, sizes = _zeros(method, spec), Totals(), set()
    for index in range(1, 51):
        delta = torch.randn(spec.shape, generator=generator)
        expert = _surveyed(method, state, spec, delta, index)
        state, sums = method.update(_ready(method, state, spec, base), delta, spec, expert)
        totals = method.tally(totals, {**sums, "task_vector": energy(delta)}, expert)
        sizes.add(len(totals.scalars))
        for key, slot in method.slots(spec).items():
            assert state[key].shape == slot.shape and state[key].dtype == slot.dtype, f"slot {key} changed"
        assert state.keys() == method.slots(spec).keys(), f"the slots became {sorted(state)}"
    assert len(sizes) == 1, f"the number of scalars changed: {sizes}"


def finite_in_finite_out(method: Method) -> None:
    """Small, ordinary and large finite task vectors give finite weights and totals."""
    base, experts = stream(3)
    for scale in (1e-12, 1.0, 1e6):
        scaled = [{name: base[name] + scale * (w - base[name]) for name, w in expert.items()} for expert in experts]
        weights, state, totals = merge(method, base, scaled)
        for name, tensor in {**weights, **state}.items():
            assert tensor.isfinite().all(), f"{name} is not finite at scale {scale}"
        assert all(isfinite(value) for value in totals.scalars.values()), f"totals {totals} at scale {scale}"


def factors_only_save_work(method: Method) -> None:
    """Told that a matrix's delta is up @ down, or not, a method folds the same, to 1e-6 of what it keeps."""
    generator = torch.Generator().manual_seed(0)
    for spec, base, _ in _tensors():
        if len(spec.shape) != 2:
            continue
        state = _zeros(method, spec)
        for index in range(1, 4):
            up, down = (
                torch.randn(shape, generator=generator).double() for shape in ((spec.shape[0], 2), (2, spec.shape[1]))
            )
            delta = (up @ down).float()
            expert = _surveyed(method, state, spec, delta, index)
            ready = _ready(method, state, spec, base)
            told, _ = method.update(ready, delta, spec, replace(expert, factors=(up, down)))
            state, _ = method.update(ready, delta, spec, expert)
            for key, tensor in state.items():
                apart, whole = (energy(x.double()) for x in (told[key] - tensor, tensor))
                assert apart <= 1e-12 * whole, f"{key} of {spec.name} is another with factors"


def every_shape_is_taken(method: Method) -> None:
    """0-d, empty, 1-D, wide, tall, stacked and rank-deficient tensors come out with the shape they went in."""
    for rank in (None, 1):
        base, experts = stream(3, rank=rank)
        weights, _, _ = merge(method, base, experts)
        for name, tensor in base.items():
            assert weights[name].shape == tensor.shape, f"{name} became {weights[name].shape}"
            assert weights[name].isfinite().all(), f"{name} is not finite"


def blocks_equal_the_whole(method: Method) -> None:
    """What a method declares elementwise is the same in blocks of rows as whole, bit for bit (sums up to rounding)."""
    base, experts = stream(3)
    whole, split = merge(method, base, experts), merge(method, base, experts, Driver(block_bytes=64))
    _assert_same(whole[1], split[1])
    for name, tensor in whole[0].items():
        assert torch.allclose(tensor, split[0][name], rtol=1e-6, atol=1e-7), f"{name} differs in blocks"


def prepared_or_not_gives_the_same_bits(method: Method) -> None:
    """What was prepared ahead and went through a file gives the bits of what is worked out on arrival."""
    if not any(method.prepares(spec) for spec, _, _ in _tensors()):
        return
    for rank in (None, 1):
        base, experts = stream(4, rank=rank)
        fresh, ahead = merge(method, base, experts), merge(method, base, experts, prepare=True)
        _assert_same(fresh[1], ahead[1])
        assert fresh[2] == ahead[2], "totals differ"


def one_sweep_equals_two(method: Method) -> None:
    """Weights written while an expert is folded are those of a read-out afterwards, bit for bit."""
    if not method.one_sweep:
        return
    base, experts = stream(3)
    for count in (1, 3):
        two, one = merge(method, base, experts[:count]), merge(method, base, experts[:count], one_sweep=True)
        _assert_same(two[0], one[0])


def params_round_trip(method: Method) -> None:
    """Parameters go through JSON and give an equal method."""
    again = type(method).from_params(json.loads(json.dumps(method.params())))
    assert again == method, f"{again} is not {method}"


def order_of_tensors_does_not_matter(method: Method) -> None:
    """An expert whose file lists its tensors in another order gives the same bits."""
    base, experts = stream(3)
    turned = [{name: expert[name] for name in reversed(list(expert))} for expert in experts]
    first, second = merge(method, base, experts), merge(method, base, turned)
    _assert_same(first[0], second[0])
    assert first[2] == second[2], "totals differ"


def order_of_experts_does_not_matter(method: Method) -> None:
    """A method that declares itself order-independent is, to 1e-6 relative."""
    if not method.order_independent:
        return
    base, experts = stream(4)
    forward, backward = merge(method, base, experts)[0], merge(method, base, reversed(experts))[0]
    for name, tensor in forward.items():
        assert torch.allclose(tensor, backward[name], rtol=1e-6, atol=1e-6), f"{name} depends on the order"


def an_expert_can_be_taken_out(method: Method) -> None:
    """A method that declares itself subtractable forgets experts that are folded again with minus their weights.

    These are no binary fractions, so that rounding leaves something of them, and the Gram matrices of the one expert
    that stays are rank-deficient.
    """
    if not method.subtractable:
        return
    base, experts = stream(3)
    kept, _, totals = merge(method, base, experts[2:])
    less, _, after = merge(method, base, [*experts, *experts[:2]], counting=[0.3, 0.7, 1.0, -0.3, -0.7])
    for name, tensor in kept.items():
        assert torch.allclose(tensor, less[name], rtol=1e-5, atol=1e-5), f"{name} remembers an expert taken out"
    assert after.experts == totals.experts, f"{after.experts} experts are left of {totals.experts}"
    for key, value in totals.scalars.items():
        assert isclose(after.scalars[key], value, rel_tol=1e-5, abs_tol=1e-6), f"{key} remembers an expert taken out"


def weights_count(method: Method) -> None:
    """A method that declares itself weighted gives something else for other weights, unless it keeps to the base.

    The second expert goes twice as far as the first and the same way, so that both have a say in every weight; or its
    own way, for a method that asks for the way alone. The weights' sum is the same, since a divisor alone is no say.
    """
    if not method.weighted:
        return
    base, (first, second) = stream(2)
    moved = False
    for other in ({name: 2 * weight - base[name] for name, weight in first.items()}, second):
        alike, uneven = (merge(method, base, [first, other], counting=each)[0] for each in ([1.0, 1.0], [0.6, 1.4]))
        if _farthest(alike, uneven) > 1e-3 * _farthest(alike, base):
            return
        moved = moved or _farthest(alike, base) > 0
    assert not moved, "the experts' weights change nothing"


def every_expert_has_its_view(method: Method) -> None:
    """What a method keeps of an expert is as it declared, and gives a finite view, the same in blocks as whole."""
    base, experts = stream(3)
    if not any(method.keeps(spec) for spec, _, _ in _tensors()):
        return
    for scale in (1e-12, 1.0, 1e6):
        scaled = [{name: base[name] + scale * (w - base[name]) for name, w in expert.items()} for expert in experts]
        whole, split = views(method, base, scaled), views(method, base, scaled, block_bytes=64)
        for ours, theirs in zip(whole, split, strict=True):
            assert ours.keys() == base.keys(), f"the view has {sorted(ours)}"
            for name, tensor in ours.items():
                assert tensor.shape == base[name].shape, f"the view of {name} became {tensor.shape}"
                assert tensor.isfinite().all(), f"the view of {name} is not finite at scale {scale}"
                assert torch.allclose(tensor, theirs[name], rtol=1e-6, atol=1e-7), (
                    f"the view of {name} differs in blocks"
                )
    _assert_same(views(method, base, [base])[0], base)


LAWS: Sequence[Law] = (
    no_expert_reads_the_base,
    zero_delta_is_harmless,
    arguments_are_never_mutated,
    same_input_same_bits,
    state_has_constant_size,
    finite_in_finite_out,
    factors_only_save_work,
    every_shape_is_taken,
    blocks_equal_the_whole,
    prepared_or_not_gives_the_same_bits,
    one_sweep_equals_two,
    params_round_trip,
    order_of_tensors_does_not_matter,
    order_of_experts_does_not_matter,
    an_expert_can_be_taken_out,
    weights_count,
    every_expert_has_its_view,
)


def _tensors() -> Iterable[tuple[TensorSpec, Tensor, list[Tensor]]]:
    base, experts = stream(2)
    for name, tensor in base.items():
        yield TensorSpec(name, tuple(tensor.shape), tensor.dtype), tensor, [e[name] - tensor for e in experts]


def _zeros(method: Method, spec: TensorSpec) -> Mapping[str, Tensor]:
    return {key: torch.zeros(slot.shape, dtype=slot.dtype) for key, slot in method.slots(spec).items()}


def _ready(method: Method, state: Tensors, spec: TensorSpec, base: Tensor) -> dict[str, Tensor]:
    """The accumulators, what the method prepares of them, and the base where it wants it, as `update` takes them."""
    return {**state, **method.prepare(state, spec), **({"base": base} if method.wants_base else {})}


def _surveyed(method: Method, state: Tensors, spec: TensorSpec, delta: Tensor, index: int) -> Contribution:
    sidecars = {kind: one for kind in method.needs for one in sidecar(kind, {spec.name: delta}).values()}
    expert = Contribution(index, sha256=f"{index:064x}", sidecars=sidecars)
    for _ in range(method.rounds):
        expert = replace(
            expert, surveys=(*expert.surveys, method.survey(state if method.surveys_state else {}, delta, spec, expert))
        )
    return expert


def _farthest(ours: Tensors, theirs: Tensors) -> float:
    """The largest difference of two values."""
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items() if tensor.numel())


def _assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), f"{name} differs"
