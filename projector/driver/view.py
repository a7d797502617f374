"""An expert's own model out of a merged one, tensor by tensor: for methods that keep a record of each expert."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from projector.algebra.linalg import widened
from projector.driver.averages import rule_of
from projector.driver.fold import BUDGET_BYTES, added
from projector.driver.measure import fitted
from projector.driver.pipeline import Pipeline
from projector.driver.steps import BLOCK_BYTES, Step, slot_name, steps, view_bytes
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader
from projector.method import Method, State, Sums
from projector.spec import TensorSpec
from projector.text import shown


@dataclass(frozen=True)
class View:
    """One expert in a head: the base, the head's method and its state after some version, the record of the expert.

    It holds no more than one block, or one tensor that the method does not take elementwise, and computes on the CPU.
    """

    base: Checkpoint
    method: Method
    state: TensorReader
    record: TensorReader
    block_bytes: int = BLOCK_BYTES
    budget_bytes: int = BUDGET_BYTES

    def sums(self) -> Sums:
        """A sweep over state and record: what the weights need to know of the whole model."""
        shares = [
            *Pipeline(1, self.budget_bytes).run(  # in one thread of linear algebra: the bits are those of any machine
                self._steps(self.base.order),
                partial(view_bytes, self.method),
                lambda step: (self._state(step), self._record(step), step.part),
                lambda read: rule_of(self.method, read[2]).view_sums(*read),
            )
        ]
        return added(shares)

    def weights(self, specs: Mapping[str, TensorSpec], sums: Sums) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the order and the dtypes of `specs`, in blocks of rows one after another. Buffers are the
        base's.

        Raises BadValues where a value does not fit into its dtype.
        """
        for name, spec in specs.items():
            if not spec.merged:
                yield name, self.base.read(name)
                continue
            for step in self._steps([name]):
                theta0 = widened(self.base.read(name, step.rows))
                found = rule_of(self.method, spec).view(theta0, self._state(step), self._record(step), sums, step.part)
                yield name, fitted(found, spec.dtype, f"this expert's view of {shown(name)}")

    def _steps(self, names: Iterable[str]) -> Iterator[Step]:
        return steps(self.base.schema, names, [self.method], self.block_bytes)

    def _state(self, step: Step) -> State:
        return stored(self.state, rule_of(self.method, step.spec).slots(step.spec), step)

    def _record(self, step: Step) -> State:
        return stored(self.record, rule_of(self.method, step.spec).keeps(step.spec), step)


def stored(file: TensorReader, slots: Mapping[str, TensorSpec], step: Step) -> State:
    """One step's part of these slots, by key, from the file that holds them for a whole model."""
    return {key: file.read(slot_name(key, step.spec.name), step.rows) for key in slots}
