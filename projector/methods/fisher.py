"""Fisher merging: each weight is averaged with the precision that each expert has for it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import energy
from projector.method import Contribution, Method, State, Sums, Survey, Totals, param
from projector.methods import _curvature as curvature
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Fisher(Method):
    """The average of the experts, each weight in proportion to its Fisher information.

    Each expert brings F_i, of the shapes of its weights, in fisher.safetensors; F is never estimated from the weights.
    As in the authors' released code, F_i is floored and then divided by its Euclidean norm over the WHOLE model, so
    that an expert whose gradients are large everywhere does not outvote the others; the norm takes a sweep over the
    expert beforehand. It is the norm of the floored F_i here, which is never zero. FusionBench differs in rounding
    only, where F is far above the floor: it adds the floor instead.

    Both sums are float64: the experts' F for one weight may lie decades apart, and taking the largest out again must
    leave the others'. A weight whose sum of F is down to rounding after that, 1e-12 of all F that it ever got, is the
    base's: those left are too unsure of it to tell.

    >>> spec, fisher = TensorSpec("w", (2,), torch.float32), Fisher(normalise=False)
    >>> state, totals = {key: torch.zeros(2, dtype=slot.dtype) for key, slot in fisher.slots(spec).items()}, Totals()
    >>> stream = [([1.0, 1.0], [3.0, 1.0]), ([5.0, 5.0], [1.0, 1.0])]
    >>> for t, (delta, f) in enumerate(stream, start=1):
    ...     expert = Contribution(t, sidecars={"fisher": torch.tensor(f)})
    ...     state, sums = fisher.update(state, torch.tensor(delta), spec, expert)
    ...     totals = fisher.tally(totals, sums, expert)
    >>> fisher.read(torch.zeros(2), state, totals, spec)
    tensor([2., 3.])
    """

    name = "fisher"
    formula = "base + sum w_i F_i tau_i / sum w_i F_i"
    paper = "Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832"
    order_independent = True
    subtractable = True
    weighted = True

    floor: float = param(1e-6, "least Fisher information of a weight, before normalising", low=1e-8, high=1)
    normalise: bool = param(True, "divide an expert's Fisher by its norm over the model")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("fisher",)

    @property
    def rounds(self) -> int:  # type: ignore[override]
        return 1 if self.normalise else 0

    @property
    def one_sweep(self) -> bool:
        return True

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {
            "num": TensorSpec(spec.name, spec.shape, torch.float64),
            "den": TensorSpec(spec.name, spec.shape, torch.float64),
            "most": TensorSpec(spec.name, spec.shape, torch.float32),  # what den would be had no expert been taken out
        }

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def workspace(self, spec: TensorSpec) -> int:
        return 4 * spec.numel * 8  # the Fisher, the weighted one, their product, what the checks compare

    def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Survey:
        return {"energy": torch.tensor(energy(self._floored(delta, spec, expert)), dtype=torch.float64)}

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        weight = self._floored(delta, spec, expert) * expert.weight / self._norm(expert)
        return {
            "num": state["num"] + weight * delta.double(),
            "den": state["den"] + weight,
            "most": state["most"] + weight.abs().float(),
        }, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if not totals.experts:
            return base.clone()
        known = state["den"] > curvature.RESIDUE * state["most"]
        return base + torch.where(known, state["num"] / state["den"], 0.0).to(base.dtype)

    def _floored(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Tensor:
        return curvature.fisher(expert, spec, delta).clamp_min(self.floor)

    def _norm(self, expert: Contribution) -> float:
        """Rounded to float32, so that the order in which the squares were added up does not show."""
        return float(expert.surveys[0]["energy"].sqrt().float()) if self.normalise else 1.0
