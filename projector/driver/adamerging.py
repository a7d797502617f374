"""AdaMerging, layer-wise (Yang et al., arXiv 2310.02575): a coefficient for each tensor and expert, learned by Adam.

    W_l = base_l + sum_t w_t clamp(lambda_lt, 0, 1) tau_lt
    dL/dlambda_lt = w_t <dL/dW_l, tau_lt>, or 0 where lambda_lt lies outside of [0, 1]

What the loss L is, and its gradient by the merged weights, is whoever else's who runs the model; with it the chain rule
is exact. A layer is a tensor, as in the authors' code, from which the clamp, Adam's betas and its step size are, too. A
weight that has several names is one layer. Running statistics are averaged, whatever the coefficients.

A coefficient depends on the gradient by its own tensor alone: so ONE sweep over the experts, tensor by tensor, takes a
step and writes what the next one is asked of. In memory are one tensor of all experts, or, where that is beyond the
budget, a block of one; the experts are then read twice in a sweep.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from projector.algebra.linalg import one_thread, widened
from projector.driver.measure import fitted, product
from projector.driver.steps import BLOCK_BYTES, Step, steps
from projector.errors import BadSchema, BadValues, Reason
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorWriter
from projector.spec import Schema, TensorSpec
from projector.text import listed, shown
from projector.watch import SILENT, Watch

LEARNING_RATE, BETAS, EPSILON = 1e-3, (0.9, 0.999), 1e-8  # the authors', and torch's own epsilon
LOW, HIGH = 0.0, 1.0
Held = Mapping[int, Sequence[tuple[int, Tensor]]]
"""The places and the task vectors of the experts in each part of one tensor, by its first row."""


@dataclass
class Coefficients:
    """lambda and Adam's two moments, each (L, T) float64 for L layers and T experts, after so many steps."""

    values: Tensor
    first: Tensor
    second: Tensor
    steps: int = 0

    @classmethod
    def started(cls, layers: int, experts: int, start: float) -> "Coefficients":
        """Before the first step: `start` everywhere."""
        zero = torch.zeros(layers, experts, dtype=torch.float64)
        return cls(torch.full_like(zero, start), zero, zero.clone())

    @property
    def clamped(self) -> Tensor:
        """As they count, (L, T)."""
        return self.values.clamp(LOW, HIGH)

    def learn(self, layer: int, gradient_T: Tensor, lr: float) -> None:
        """One of Adam's updates in one layer, by the gradient of the loss by its clamped coefficients."""
        value_T, first_T, second_T = self.values[layer], self.first[layer], self.second[layer]
        slope_T = gradient_T.where((value_T >= LOW) & (value_T <= HIGH), torch.zeros_like(gradient_T))
        first_T.lerp_(slope_T, 1 - BETAS[0])
        second_T.mul_(BETAS[1]).addcmul_(slope_T, slope_T, value=1 - BETAS[1])
        n = self.steps + 1
        mean_T, square_T = first_T / (1 - BETAS[0] ** n), second_T / (1 - BETAS[1] ** n)
        value_T.sub_(lr * mean_T / (square_T.sqrt() + EPSILON))


class Adamerging:
    """The coefficients of these experts over one base, and the merged weights that they give.

    experts: with the base's names. weights: how much each counts beside the others. start: every coefficient at first.
    budget_bytes: what the task vectors of one tensor may take together to be read once in a sweep.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Checkpoint],
        weights: Sequence[float],
        start: float,
        *,
        lr: float = LEARNING_RATE,
        block_bytes: int = BLOCK_BYTES,
        budget_bytes: int = BLOCK_BYTES,
        watch: Watch = SILENT,
    ) -> None:
        self._base, self._experts, self._weights, self._lr, self.start = base, experts, weights, lr, start
        self._block_bytes, self._budget_bytes, self._watch = block_bytes, budget_bytes, watch
        self.layers = _layers(base)
        self.coefficients = Coefficients.started(len(self.layers), len(experts), start)
        self._row = {name: row for row, names in enumerate(self.layers) for name in names}

    @property
    def specs(self) -> list[TensorSpec]:
        """The merged weights as they are to be run with: float32, and float64 where the base is."""
        merged = [spec for spec in self._base.schema.values() if spec.merged]
        return [TensorSpec(one.name, one.shape, torch.promote_types(one.dtype, torch.float32)) for one in merged]

    def described(self) -> dict[str, list[float | None]]:
        """By tensor, the coefficient of each expert; None where the expert leaves the tensor as it is."""
        clamped: list[list[float]] = self.coefficients.clamped.tolist()
        return {
            name: [value if one.touches(name) else None for value, one in zip(clamped[row], self._experts, strict=True)]
            for name, row in self._row.items()
        }

    @one_thread()
    def sweep(
        self, writers: Sequence[TensorWriter], gradients: Checkpoint | None = None, *, hashed: bool = True
    ) -> None:
        """Takes a step by these gradients, if any are given, and writes the merged weights of the coefficients.

        gradients: of the loss by the merged weights, by name; where it has none there, it is zero. hashed: the writers
        are to say what they wrote. Raises BadSchema or BadValues, and then no more than a part of a step was taken.
        """
        if gradients is not None:
            check_gradients(self._base.schema, gradients.schema)
        learned: set[int] = set()
        for writer in writers:
            for name, spec in writer.specs.items():
                if spec.merged:
                    self._sweep(writer, spec, gradients, learned, hashed)
                else:
                    writer.write(name, self._base.read(name))
        self.coefficients.steps += gradients is not None

    def _sweep(
        self, writer: TensorWriter, spec: TensorSpec, gradients: Checkpoint | None, learned: set[int], hashed: bool
    ) -> None:
        """One tensor; `learned` are the layers that have taken their step."""
        parts = list(steps(self._base.schema, [spec.name], (), self._block_bytes))
        held, row = self._held(parts), self._row.get(spec.name)
        if gradients is not None and row is not None and row not in learned:
            learned.add(row)
            self._learn(row, spec.name, held, gradients)
        for step in parts:
            narrow = fitted(self._merged(step, held), spec.dtype, f"the merged {shown(spec.name)}")
            piece = writer.put(spec.name, narrow, step.part.start)
            if hashed:
                writer.hash(piece)
            self._watch.advance(step.nbytes)

    def _learn(self, row: int, name: str, held: Held, gradients: Checkpoint) -> None:
        """One layer's step. A tied weight's gradients, under whichever names they are, add up."""
        total_T = torch.zeros(len(self._experts), dtype=torch.float64)
        for alias in self.layers[row]:
            if alias not in gradients.schema:
                continue
            for step in steps(self._base.schema, [alias], (), self._block_bytes):
                slope = gradients.read(alias, step.rows)
                for place, delta in self._deltas(step, held if alias == name else {}):
                    total_T[place] += self._weights[place] * product(delta, slope)
        if not isfinite(float(total_T.abs().sum())):
            raise BadValues(
                Reason.NOT_FINITE,
                f"the gradient by {shown(name)} holds NaN or infinite values, or overflows",
                "look at the logits: a loss of NaN comes from them",
            )
        self.coefficients.learn(row, total_T, self._lr)

    def _merged(self, step: Step, held: Held) -> Tensor:
        name = step.spec.name
        merged = widened(self._base.read(name, step.rows)).clone()
        row = self._row.get(name)
        even = 1 / sum(self._weights)
        shares = [even] * len(self._experts) if row is None else self.coefficients.clamped[row].tolist()
        for place, delta in self._deltas(step, held):
            merged.add_(delta, alpha=shares[place] * self._weights[place])
        return merged

    def _held(self, parts: Sequence[Step]) -> Held:
        """The task vectors of one tensor, where they fit; nothing where they are to be read block by block."""
        touched = sum(one.touches(parts[0].spec.name) for one in self._experts)
        if 4 * parts[0].spec.numel * touched > self._budget_bytes:
            return {}
        return {step.part.start: list(self._deltas(step, {})) for step in parts}

    def _deltas(self, step: Step, held: Held) -> Iterator[tuple[int, Tensor]]:
        """The place of each expert that changes this part of a tensor, and its task vector there, float32."""
        if step.part.start in held:
            yield from held[step.part.start]
            return
        theta0 = self._base.read(step.spec.name, step.rows)
        for place, one in enumerate(self._experts):
            if one.touches(step.spec.name):
                yield place, one.delta(step.spec, theta0, one.fetch(step.spec, step.rows))


def check_gradients(base: Schema, gradients: Schema) -> None:
    """Raises BadSchema where what is given as gradients are not those of tensors that are merged."""
    strange = [name for name in gradients if name not in base or not base[name].merged]
    if strange or not gradients:
        what = f"gradients by {listed(strange)}, which is no merged weight" if strange else "no gradient at all"
        raise BadSchema(
            Reason.UNEXPECTED_TENSOR if strange else Reason.MISSING_TENSOR,
            f"there is {what}",
            "name each as in the file of weights; one that is left out counts as zero",
        )
    for name, spec in gradients.items():
        if spec.shape != base[name].shape or not spec.floating:
            raise BadSchema(
                Reason.WRONG_SHAPE if spec.floating else Reason.UNSUPPORTED_DTYPE,
                f"the gradient by {shown(name)} is {spec.dtype} {list(spec.shape)}, the weight has shape "
                f"{list(base[name].shape)}".replace("torch.", ""),
                "write it in the weight's shape, as float32",
            )


def _layers(base: Checkpoint) -> list[list[str]]:
    """The names of each tensor that has coefficients: a tied weight has several."""
    twins, found, known = base.twins(), [], set[str]()
    for name, spec in base.schema.items():
        if spec.merged and not spec.statistic and name not in known:
            found.append([name, *twins.get(name, ())])
            known.update(found[-1])
    return found
