"""A smile head's state as the tensors of a model with routed layers: what lies beneath, and each layer's experts."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from projector.algebra.linalg import widened
from projector.driver.averages import rule_of
from projector.driver.measure import fitted
from projector.driver.steps import BLOCK_BYTES, Step, steps
from projector.driver.view import stored
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader
from projector.method import State, Totals
from projector.methods.smile import Smile
from projector.spec import Schema, TensorSpec
from projector.text import shown

WEIGHT, BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class RoutedModel:
    """The base, a smile head's method, and its state and totals after some version that has an expert at least.

    Beside the base's tensors there are, of each of e experts, the oldest first, in a layer X with a weight (m, n):
    X.experts_left (e, q, m) and X.experts_right (e, q, n), in rows, X.experts_s (e, q), and where it has a bias
    X.experts_bias (e, m): their biases less the base's.
    """

    base: Checkpoint
    method: Smile
    state: TensorReader
    totals: Totals

    @property
    def layers(self) -> list[str]:
        """The names of what may be linear layers: only whoever builds the model knows which are."""
        return [
            name.removesuffix(WEIGHT)
            for name, spec in self.base.schema.items()
            if name.endswith(WEIGHT) and self._is_smile(spec) and self.method.routes(spec)
        ]

    def specs(self, published: Schema) -> dict[str, TensorSpec]:
        """Every tensor. published: the base's, in the dtype wanted."""
        found = dict(published)
        for name in self.layers:
            found |= {part.name: part for part in self._parts(name, published[name + WEIGHT].dtype).values()}
        return found

    def tensors(self, published: Schema) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first row, rows) of every tensor of `specs`, one after the other. Raises BadMerged where a value does
        not fit into its dtype.

        Beneath a router lies what `Smile.shared` says; what is no layer's is the base's, as in the authors' code.
        """
        layers = self.layers
        routed = {name + WEIGHT for name in layers} | {name + BIAS for name in layers if self._biased(name)}
        for name, spec in published.items():
            if name in routed:
                ours = self.base.schema[name]
                found = self.method.shared(widened(self.base.read(name)), self._slots(ours), self.totals, ours)
                yield name, 0, _as(found, spec)
                continue
            for step in steps(self.base.schema, [name], [], BLOCK_BYTES):
                rows = self.base.read(name, step.rows)
                yield name, step.rows.start if step.rows else 0, _as(rows, spec)
        for name in layers:
            yield from self._experts(name, published[name + WEIGHT])

    def _experts(self, name: str, published: TensorSpec) -> Iterator[tuple[str, int, Tensor]]:
        places = self.method.places(self.totals)
        read = self._slots(self.base.schema[name + WEIGHT])
        parts = {
            "left": read["L"][places].transpose(1, 2),
            "right": read["R"][places].transpose(1, 2),
            "s": read["s"][places, 0],
        }
        if self._biased(name):
            parts["bias"] = self._slots(self.base.schema[name + BIAS])["D"][places]
        for key, part in self._parts(name, published.dtype).items():
            yield part.name, 0, _as(parts[key], part)

    def _parts(self, name: str, dtype: torch.dtype) -> dict[str, TensorSpec]:
        weight = self.base.schema[name + WEIGHT]
        slots = self.method.slots(weight)
        (_, m, q), (_, n, _) = slots["L"].shape, slots["R"].shape
        e = len(self.method.places(self.totals))
        shapes: dict[str, tuple[int, ...]] = {"left": (e, q, m), "right": (e, q, n), "s": (e, q)}
        if self._biased(name):
            shapes["bias"] = (e, *self.base.schema[name + BIAS].shape)
        return {
            key: replace(weight, name=f"{name}.experts_{key}", shape=shape, dtype=dtype)
            for key, shape in shapes.items()
        }

    def _slots(self, spec: TensorSpec) -> State:
        return stored(self.state, self.method.slots(spec), Step(spec))

    def _is_smile(self, spec: TensorSpec) -> bool:
        return spec.merged and rule_of(self.method, spec) is self.method

    def _biased(self, name: str) -> bool:
        spec = self.base.schema.get(name + BIAS)
        return spec is not None and self._is_smile(spec) and self.method.biases(spec)


def _as(x: Tensor, spec: TensorSpec) -> Tensor:
    return fitted(x, spec.dtype, f"the routed model's {shown(spec.name)}") if spec.merged else x
