"""TIES: trim, elect a sign, merge what agrees with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import copysign

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from projector.method import Expert, Method, State, Sums, Survey, Totals, param
from projector.selection import just_below, kept, kth_largest, survey, surveyed
from projector.spec import TensorSpec
from projector.thinning import pieces

# P, N: sums of the positive and of the negative trimmed values; c+, c-: the experts' weights in them ("mean") or how
# many experts ("sum"); S = P + N; max+, max-: the largest and the smallest trimmed value, or zero
SLOTS: Mapping[str, Mapping[str, torch.dtype]] = {
    "mean": {"P": torch.float32, "N": torch.float32, "c+": torch.float64, "c-": torch.float64},
    "sum": {"P": torch.float32, "N": torch.float32, "c+": torch.float32, "c-": torch.float32},
    "max": {"S": torch.float32, "max+": torch.float32, "max-": torch.float32},
}

ROUNDING = 1e-6  # what is smaller than the share of its summands counts as zero


@dataclass(frozen=True)
class Ties(Method):
    """Trims each task vector to its largest values, elects a sign for every weight, and merges the values that have it.

    Trimming keeps the share `density` of the values by magnitude, of the whole model ("model", as in the paper) or of
    each tensor; those equal to the smallest one that is kept are kept too. The sign of a weight is that of
    sum w_i trimmed_i; where they cancel out up to rounding, it is the sign that most weights of the model elected.
    "mean" is sum w_i trimmed_i / sum w_i over the experts that agree, "sum" is sum w_i trimmed_i over them, "max" the
    w_i trimmed_i of largest magnitude among theirs, which cannot be taken out again.

    For "mean" and "sum" it is also counted, exactly, who has a value of either sign: what rounding leaves of experts
    that were taken out has no vote, and an expert of small weight keeps its own. Scope "tensor" takes a tensor whole,
    up to 33 GiB of memory for an embedding of 128256 x 4096; `init` refuses one that does not fit, with both numbers.

    >>> stream = [torch.tensor([4.0, 1.0, -3.0]), torch.tensor([2.0, 0.1, 5.0])]
    >>> spec, ties = TensorSpec("w", (3,), torch.float32), Ties(density=0.5, scope="tensor")
    >>> state, totals = {key: torch.zeros(3, dtype=slot.dtype) for key, slot in ties.slots(spec).items()}, Totals()
    >>> for t, delta in enumerate(stream, start=1):
    ...     state, sums = ties.update(state, delta, spec, Expert(t))
    ...     totals = ties.tally(totals, sums, Expert(t))
    >>> ties.read(torch.zeros(3), state, totals, spec)
    tensor([3., 0., 5.])
    """

    name = "ties"
    formula = "base + scale * (mean, sum or max of the trimmed w_i tau_i with the sign of their sum)"
    paper = "Yadav et al., TIES-merging: resolving interference when merging models, arXiv 2306.01708"
    order_independent = True
    weighted = True

    density: float = param(0.2, "the share of a task vector's values that is kept, the largest", low=0, high=1)
    scope: str = param(
        "model", "what the share is taken of: the whole model or each tensor", choices=("model", "tensor")
    )
    combine: str = param("mean", "how the values with the elected sign are merged", choices=("mean", "sum", "max"))
    scale: float = param(1.0, "the factor of the merged task vector", low=-10, high=10)

    @property
    def subtractable(self) -> bool:  # type: ignore[override]
        return self.combine != "max"

    @property
    def rounds(self) -> int:  # type: ignore[override]
        return 2 if self.scope == "model" and self.density < 1 else 0

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {key: TensorSpec(spec.name, spec.shape, dtype) for key, dtype in SLOTS[self.combine].items()}

    def elementwise(self, spec: TensorSpec) -> bool:
        return self.scope == "model" or self.density == 1

    def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Expert) -> Survey:
        return survey(delta, self.density, expert.surveys)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Expert) -> tuple[State, Sums]:
        below = self._trimmed_up_to(delta, expert)
        after = {
            key: torch.empty(delta.shape, dtype=dtype, device=delta.device)
            for key, dtype in SLOTS[self.combine].items()
        }
        majority = 0.0
        for part in pieces(delta):
            trimmed = hardshrink(delta.reshape(-1)[part], below)
            added = self._add({key: state[key].reshape(-1)[part] for key in after}, trimmed, expert.weight)
            majority += float(self._votes(added).sign_().sum())
            for key, value in added.items():
                after[key].view(-1)[part] = value
        return after, {"majority": majority}

    def tally(self, totals: Totals, sums: Sums, expert: Expert) -> Totals:
        counted = super().tally(totals, sums, expert)
        return Totals(counted.experts, {**counted.scalars, "majority": sums["majority"]})

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        merged = base.clone(memory_format=torch.contiguous_format)
        if totals.experts:
            for part in pieces(base):
                values = self._elected({key: x.reshape(-1)[part] for key, x in state.items()}, totals)
                merged.view(-1)[part].add_(values, alpha=self.scale)
        return merged

    def _trimmed_up_to(self, delta: Tensor, expert: Expert) -> float:
        """The largest magnitude that trimming makes zero."""
        if self.density == 1:
            return 0.0
        if self.scope == "model":
            least = surveyed(self.density, expert.surveys)
        else:
            (least,) = kth_largest(delta, kept(self.density, delta.numel()))
        return just_below(least)

    def _add(self, state: State, trimmed: Tensor, weight: float) -> State:
        """The accumulators with one more expert."""
        up, down = trimmed.clamp_min(0), trimmed.clamp_max(0)
        if self.combine == "max":
            return {
                "S": torch.add(state["S"], trimmed, alpha=weight),
                "max+": torch.maximum(state["max+"], up.mul_(weight)),
                "max-": torch.minimum(state["max-"], down.mul_(weight)),
            }
        # A weight rounded to float32 has so few digits that a float64 sum of them is exact, as is one of ones.
        share = weight if self.combine == "mean" else copysign(1, weight)
        return {
            "P": torch.add(state["P"], up, alpha=weight),
            "N": torch.add(state["N"], down, alpha=weight),
            "c+": state["c+"] + up.sign_().mul_(share),
            "c-": state["c-"] - down.sign_().mul_(share),
        }

    def _elected(self, state: State, totals: Totals) -> Tensor:
        """The merged task vector, unscaled. In float32 throughout: arithmetic with bool takes several times longer."""
        up, down = self._sides(state)
        votes = self._votes(state)
        positive = votes.ge_(0.0) if totals.scalars["majority"] > 0 else votes.gt_(0.0)  # 1 or 0
        merged = torch.lerp(down, up, positive)  # one or the other
        if self.combine != "mean":
            return merged
        weight = torch.lerp(state["c-"].float(), state["c+"].float(), positive)
        return merged.div_(weight.masked_fill_(weight == 0, 1))

    def _sides(self, state: State) -> tuple[Tensor, Tensor]:
        """What may be read out: of the positive values, and of the negative ones; zero where nobody has any."""
        if self.combine == "max":
            return state["max+"], state["max-"]
        return state["P"] * state["c+"].sign().float(), state["N"] * state["c-"].sign().float()

    def _votes(self, state: State) -> Tensor:
        """The sum of all trimmed values, whose sign is elected; zero where nothing but rounding is left of it."""
        up, down = self._sides(state)
        votes = state["S"] if self.combine == "max" else torch.add(up, down)
        return votes.abs().gt_(torch.sub(up, down).mul_(ROUNDING)).mul_(votes)
