"""The laws that every merging method obeys, for ours and for third parties' alike.

    from projector.checks import LAWS

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
    def test_my_method(law):
        law(MyMethod())

A law raises AssertionError with what was broken, or lets through the error that the method or the driver raised. It
runs the method as the driver does, on small seeded tensors.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import IO

import torch
from torch import Tensor

from projector.fold import Driver, HeadFold, state_specs
from projector.method import Expert, Method, Totals
from projector.source import Checkpoint
from projector.spec import TensorSpec
from projector.tensorfile import TensorReader, TensorWriter

Law = Callable[[Method], None]
Tensors = Mapping[str, Tensor]

SHAPES = {
    "scalar": (),
    "empty": (0, 4),
    "bias": (7,),
    "square.weight": (8, 8),
    "tall.weight": (12, 5),
    "wide.weight": (5, 12),
    "column.weight": (6, 1),
    "word_embeddings.weight": (40, 4),
    "experts.weight": (2, 4, 6),
    "conv.weight": (4, 3, 2, 2),
}


def stream(count: int, rank: int | None = None, seed: int = 0) -> tuple[Tensors, list[Tensors]]:
    """A base and `count` experts of every shape that matters; `rank` limits that of the matrices' task vectors."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts: list[Tensors] = []
    for _ in range(count):
        deltas = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for name, shape in SHAPES.items():
            if rank is not None and len(shape) == 2:
                left, right = (
                    torch.randn(shape[0], rank, generator=generator),
                    torch.randn(rank, shape[1], generator=generator),
                )
                deltas[name] = 0.1 * left @ right
        experts.append({name: base[name] + delta for name, delta in deltas.items()})
    return base, experts


def merge(
    method: Method,
    base: Tensors,
    experts: Iterable[Tensors],
    driver: Driver = Driver(block_bytes=1 << 20),  # noqa: B008
) -> tuple[dict[str, Tensor], dict[str, Tensor], Totals]:
    """(merged weights, state, totals) after a stream of experts, through real files and the real driver."""
    totals = Totals()
    with _Files() as files:
        origin = Checkpoint([files.written(base)])
        state = None
        for index, weights in enumerate(experts, start=1):
            source = Checkpoint(
                [files.written(weights)], {kind: files.written(_sidecar(kind, weights)) for kind in method.needs}
            )
            expert = driver.survey(origin, source, method, Expert(index, sha256=f"{index:064x}"))
            fd = files.new()
            after = TensorWriter(fd, state_specs(method, origin.schema), {})
            totals = driver.fold(origin, source, [HeadFold(method, totals, expert, state, after)]).totals[0]
            state = TensorReader(fd)
        fd = files.new()
        out = TensorWriter(fd, list(origin.schema.values()), {})
        driver.read_out(origin, method, totals, state, [out])
        return _all(TensorReader(fd)), _all(state) if state else {}, totals


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
    """Neither update nor read changes a tensor it was given."""
    for spec, base, deltas in _tensors():
        state = _zeros(method, spec)
        for index, delta in enumerate(deltas, start=1):
            expert = _surveyed(method, spec, delta, index)
            given = {"delta": delta, **state}
            before = {key: value.clone() for key, value in given.items()}
            state, sums = method.update(state, delta, spec, expert)
            _assert_same(given, before)
        totals = method.tally(Totals(), sums)
        given = {"base": base, **state}
        before = {key: value.clone() for key, value in given.items()}
        method.read(base, state, totals, spec)
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
    state, totals, sizes = _zeros(method, spec), Totals(), set()
    for index in range(1, 51):
        delta = torch.randn(spec.shape, generator=generator)
        state, sums = method.update(state, delta, spec, _surveyed(method, spec, delta, index))
        totals = method.tally(totals, sums)
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


LAWS: Sequence[Law] = (
    no_expert_reads_the_base,
    zero_delta_is_harmless,
    arguments_are_never_mutated,
    same_input_same_bits,
    state_has_constant_size,
    finite_in_finite_out,
    every_shape_is_taken,
    blocks_equal_the_whole,
    params_round_trip,
    order_of_tensors_does_not_matter,
    order_of_experts_does_not_matter,
)


class _Files:
    """Unnamed temporary files that live as long as the block."""

    def __enter__(self) -> "_Files":
        self._open: list[IO[bytes]] = []
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open:
            file.close()

    def new(self) -> int:
        self._open.append(tempfile.TemporaryFile())  # noqa: SIM115
        return self._open[-1].fileno()

    def written(self, tensors: Tensors) -> TensorReader:
        fd = self.new()
        writer = TensorWriter(fd, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], {})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return TensorReader(fd)


def _all(reader: TensorReader) -> dict[str, Tensor]:
    return {name: reader.read(name) for name in reader.specs}


def _tensors() -> Iterable[tuple[TensorSpec, Tensor, list[Tensor]]]:
    base, experts = stream(2)
    for name, tensor in base.items():
        yield TensorSpec(name, tuple(tensor.shape), tensor.dtype), tensor, [e[name] - tensor for e in experts]


def _zeros(method: Method, spec: TensorSpec) -> Mapping[str, Tensor]:
    return {key: torch.zeros(slot.shape, dtype=slot.dtype) for key, slot in method.slots(spec).items()}


def _sidecar(kind: str, tensors: Tensors) -> dict[str, Tensor]:
    """A made-up sidecar: a diagonal Fisher is never negative, a Gram matrix is that of a layer's inputs."""
    if kind == "gram":
        return {name.removesuffix(".weight"): x.T @ x for name, x in tensors.items() if x.ndim == 2}
    return {name: x.square() for name, x in tensors.items()}


def _surveyed(method: Method, spec: TensorSpec, delta: Tensor, index: int) -> Expert:
    sidecars = {kind: one for kind in method.needs for one in _sidecar(kind, {spec.name: delta}).values()}
    expert = Expert(index, sha256=f"{index:064x}", sidecars=sidecars)
    for _ in range(method.rounds):
        expert = Expert(index, expert.sha256, (*expert.surveys, method.survey(delta, spec, expert)), sidecars)
    return expert


def _assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), f"{name} differs"
