"""The steps of a sweep over a model, each a tensor or a block of its rows, and the memory that each takes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from projector.driver.averages import rule_of
from projector.method import Method
from projector.names.depth import depths
from projector.spec import Schema, TensorSpec

BLOCK_BYTES = 3 << 20
ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the base that is merged, or its `rows`; None is the whole of it."""

    spec: TensorSpec
    rows: slice | None = None

    @property
    def part(self) -> TensorSpec:
        """The spec as a method sees it, which says where a block starts."""
        return replace(self.spec, start=self.rows.start) if self.rows else self.spec

    def shape_of(self, slot: TensorSpec) -> tuple[int, ...]:
        """The shape of this step's part of an accumulator."""
        return (self.rows.stop - self.rows.start, *slot.shape[1:]) if self.rows else slot.shape

    @property
    def numel(self) -> int:
        return (self.rows.stop - self.rows.start) * self.spec.row_numel if self.rows else self.spec.numel

    @property
    def nbytes(self) -> int:
        """Its size in the base."""
        return self.numel * self.spec.dtype.itemsize


def steps(schema: Schema, names: Iterable[str], methods: Sequence[Method], block_bytes: int) -> Iterator[Step]:
    """The steps through these tensors: in blocks of rows where every method takes the tensor elementwise."""
    depth = depths(schema) if any(method.wants_depth for method in methods) else {}
    for name in names:
        spec = replace(schema[name], depth=depth[name]) if name in depth else schema[name]
        rows = max(1, block_bytes // max(1, spec.row_numel * 4))
        if (
            not spec.shape
            or rows >= spec.shape[0]
            or not all(rule_of(method, spec).elementwise(spec) for method in methods)
        ):
            yield Step(spec)
            continue
        for start in range(0, spec.shape[0], rows):
            yield Step(spec, slice(start, min(start + rows, spec.shape[0])))


def slot_name(slot: str, tensor: str) -> str:
    """The name of an accumulator, or of what was prepared, in its file: "A/layer.0.weight"."""
    return f"{slot}/{tensor}"


def state_specs(method: Method, schema: Schema) -> list[TensorSpec]:
    """The tensors of a method's state file over a base's schema."""
    return _file_specs(lambda spec: rule_of(method, spec).slots(spec), schema)


def state_bytes(method: Method, schema: Schema) -> int:
    """What a method's state takes over a base's schema."""
    return sum(spec.nbytes for spec in state_specs(method, schema))


def prepared_specs(method: Method, schema: Schema) -> list[TensorSpec]:
    """The tensors of the file that holds what a method prepares; none where it prepares nothing.

    Beside them, under `ROWS`, how many rows each of them has for a tensor of the base.
    """
    return _file_specs(lambda spec: _with_rows(spec, rule_of(method, spec).prepares(spec)), schema)


def record_specs(method: Method, schema: Schema) -> list[TensorSpec]:
    """The tensors of the file that holds what a method keeps of one expert; none where it keeps nothing."""
    return _file_specs(lambda spec: rule_of(method, spec).keeps(spec), schema)


def fold_bytes(methods: Sequence[Method], step: Step, *, origin: bool = False) -> int:
    """The memory that a step of a fold takes at its peak: what is read, the delta, and each head's states, old and new,
    and its record of the expert.

    Counts the expert at the base's width or float32, and what is published at the base's. origin: there is the version
    that the expert was trained from too, and the delta to it; the expert is then there twice.
    """
    spec = step.spec
    width = max(4, spec.dtype.itemsize)
    operands = step.numel * (spec.dtype.itemsize + width + 4 + (2 * width + 4 if origin else 0))
    states = sum(2 * _slots_bytes(method, step) + _prepared_bytes(method, spec) + step.nbytes for method in methods)
    widened = 4 * step.numel if any(rule_of(method, spec).wants_base for method in methods) else 0
    records = sum(_record_bytes(method, step) for method in methods)
    return operands + states + records + widened + max(_workspace(method, step) for method in methods)


def prepare_bytes(method: Method, step: Step) -> int:
    """The memory that preparing one tensor takes at its peak."""
    return _slots_bytes(method, step) + _prepared_bytes(method, step.spec) + _workspace(method, step)


def read_bytes(method: Method, step: Step) -> int:
    """The memory that a step of a read-out takes at its peak: base, state, merged values and weights."""
    return _slots_bytes(method, step) + 2 * step.nbytes + step.numel * 8 + _workspace(method, step)


def view_bytes(method: Method, step: Step) -> int:
    """The memory that a step of a view takes at its peak: as a read-out, and the record."""
    return read_bytes(method, step) + _record_bytes(method, step)


def largest_step(
    schema: Schema, methods: Sequence[Method], block_bytes: int, *, origin: bool = False
) -> tuple[Step, int]:
    """The step of a fold that takes the most memory, and how many bytes. `schema` has a tensor that is merged."""
    names = [name for name, spec in schema.items() if spec.merged]
    costs = ((step, fold_bytes(methods, step, origin=origin)) for step in steps(schema, names, methods, block_bytes))
    return max(costs, key=lambda cost: cost[1])


def _file_specs(slots: Callable[[TensorSpec], Mapping[str, TensorSpec]], schema: Schema) -> list[TensorSpec]:
    """The tensors of a file with these slots of every tensor that is merged."""
    return [
        replace(slot, name=slot_name(key, name))
        for name, spec in schema.items()
        if spec.merged
        for key, slot in slots(spec).items()
    ]


def _with_rows(spec: TensorSpec, prepared: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
    return {**prepared, ROWS: TensorSpec(spec.name, (len(prepared),), torch.int64)} if prepared else {}


def _share(step: Step, whole: int) -> int:
    """What of a whole tensor's bytes falls to one step; rounded up."""
    return -(-whole * step.numel // max(1, step.spec.numel)) if step.rows else whole


def _slots_bytes(method: Method, step: Step) -> int:
    return _share(step, sum(slot.nbytes for slot in rule_of(method, step.spec).slots(step.spec).values()))


def _record_bytes(method: Method, step: Step) -> int:
    return _share(step, sum(slot.nbytes for slot in rule_of(method, step.spec).keeps(step.spec).values()))


def _prepared_bytes(method: Method, spec: TensorSpec) -> int:
    return sum(slot.nbytes for slot in rule_of(method, spec).prepares(spec).values())


def _workspace(method: Method, step: Step) -> int:
    return _share(step, rule_of(method, step.spec).workspace(step.spec))
