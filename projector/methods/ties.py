"""TIES: trim, elect a sign, merge what agrees with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from projector.algebra.linalg import pieces
from projector.algebra.selection import just_below, kept, kth_largest, survey, surveyed
from projector.method import Contribution, Method, State, Sums, Survey, Totals, param
from projector.spec import TensorSpec

# P, N: sums of the positive and of the negative trimmed values; c+, c-: the weights of the experts in them, in
# thousandths; S = P + N; max+, max-: the largest and the smallest trimmed value, or zero
SLOTS: Mapping[str, Sequence[str]] = {
    "mean": ("P", "N", "c+", "c-"),
    "sum": ("P", "N", "c+", "c-"),
    "max": ("S", "max+", "max-"),
}

THOUSANDTHS = 1000.0
NOBODY = 0.5  # of them: half the least weight
ROUNDING = 1e-6  # what is smaller than the share of its summands counts as zero


@dataclass(frozen=True)
class Ties(Method):
    """Trims task vectors to their largest values, elects a sign for every weight, merges what has it.

    Trimming keeps the share `density` of the values by magnitude, of the whole model ("model", as in the paper) or of
    each tensor; those equal to the smallest one that is kept are kept too. The sign of a weight is that of
    sum w_i trimmed_i; where they cancel out up to rounding, it is the sign that most weights of the model elected.
    "mean" is sum w_i trimmed_i / sum w_i over the experts that agree, "sum" is sum w_i trimmed_i over them, "max" the
    w_i trimmed_i of largest magnitude among theirs, which cannot be taken out again.

    For "mean" and "sum" it is also counted how much weight either sign has: what rounding leaves of experts that were
    taken out has no vote, and an expert of small weight keeps its own. Counting in thousandths is exact for weights of
    up to three decimals while they add up to less than 16777. Scope "tensor" takes a tensor whole, up to 33 GiB of
    memory for an embedding of 128256 x 4096; `init` refuses one that does not fit, with both numbers.

    >>> stream = [torch.tensor([4.0, 1.0, -3.0]), torch.tensor([2.0, 0.1, 5.0])]
    >>> spec, ties = TensorSpec("w", (3,), torch.float32), Ties(density=0.5, scope="tensor")
    >>> state, totals = {key: torch.zeros(3) for key in ties.slots(spec)}, Totals()
    >>> for t, delta in enumerate(stream, start=1):
    ...     state, sums = ties.update(state, delta, spec, Contribution(t))
    ...     totals = ties.tally(totals, sums, Contribution(t))
    >>> ties.read(torch.zeros(3), state, totals, spec)
    tensor([3., 0., 5.])
    """

    name = "ties"
    formula = "base + scale * (mean, sum or max of the trimmed w_i tau_i with the sign of their sum)"
    paper = "Yadav et al., TIES-merging, arXiv 2306.01708"
    order_independent = True
    weighted = True
    one_sweep = True

    density: float = param(0.2, "share of a task vector's values kept, the largest", low=0, high=1, idle=0)
    scope: str = param("model", "what the share is taken of", choices=("model", "tensor"))
    combine: str = param("mean", "what the values of the elected sign become", choices=("mean", "sum", "max"))
    scale: float = param(1.0, "factor of the merged task vector", low=-10, high=10, idle=0)

    @property
    def grows(self) -> bool:
        return self.combine != "mean"

    @property
    def subtractable(self) -> bool:  # type: ignore[override]
        return self.combine != "max"

    @property
    def rounds(self) -> int:  # type: ignore[override]
        return 2 if self.scope == "model" and self.density < 1 else 0

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {key: TensorSpec(spec.name, spec.shape, torch.float32) for key in SLOTS[self.combine]}

    def elementwise(self, spec: TensorSpec) -> bool:
        return self.scope == "model" or self.density == 1

    def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Survey:
        return survey(delta, self.density, expert.surveys)

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        below = self._trimmed_up_to(delta, expert)
        after = {key: torch.empty_like(delta, memory_format=torch.contiguous_format) for key in SLOTS[self.combine]}
        majority = 0.0
        for part in pieces(delta):
            trimmed = hardshrink(delta.reshape(-1)[part], below)
            added = self._add({key: state[key].reshape(-1)[part] for key in after}, trimmed, expert.weight)
            for key, value in added.items():
                after[key].view(-1)[part] = value
            low, high = self._votes(added)
            majority += float(low.sign_().add_(high.sign_()).sum())
        return after, {"majority": majority}

    def tally(self, totals: Totals, sums: Sums, expert: Contribution) -> Totals:
        counted = super().tally(totals, sums, expert)
        majority = sums.get("majority", totals.scalars.get("majority", 1.0))  # seldom another than before this expert
        return Totals(counted.experts, {**counted.scalars, "majority": 1.0 if majority > 0 else -1.0})

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        merged = base.clone(memory_format=torch.contiguous_format)
        if totals.experts:
            for part in pieces(base):
                values = self._elected({key: x.reshape(-1)[part] for key, x in state.items()}, totals)
                merged.view(-1)[part].add_(values, alpha=self.scale)
        return merged

    def _trimmed_up_to(self, delta: Tensor, expert: Contribution) -> float:
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
        up = trimmed.clamp_min(0)
        down = trimmed - up
        if self.combine == "max":
            return {
                "S": torch.add(state["S"], trimmed, alpha=weight),
                "max+": torch.maximum(state["max+"], up.mul_(weight)),
                "max-": torch.minimum(state["max-"], down.mul_(weight)),
            }
        added = {
            "P": torch.add(state["P"], up, alpha=weight),
            "N": torch.add(state["N"], down, alpha=weight),
            "c+": torch.add(state["c+"], up.sign_(), alpha=THOUSANDTHS * weight),
            "c-": torch.sub(state["c-"], down.sign_(), alpha=THOUSANDTHS * weight),
        }
        return _cleared(added) if weight < 0 else added

    # Both in float32 throughout: arithmetic with bool takes ten times longer.

    def _votes(self, state: State) -> tuple[Tensor, Tensor]:
        """(low, high): between them lies the sum of all trimmed values, with their signs but scaled, as far as rounding
        tells. Positive where low > 0, negative where high < 0."""
        if self.combine == "max":
            rounding = torch.sub(state["max+"], state["max-"]).mul_(ROUNDING)
            return state["S"] - rounding, rounding.add_(state["S"])
        ratio = (1 + ROUNDING) / (1 - ROUNDING)  # P + N -+ ROUNDING (P - N), up to a factor
        return torch.add(state["P"], state["N"], alpha=ratio), torch.add(state["N"], state["P"], alpha=ratio)

    def _elected(self, state: State, totals: Totals) -> Tensor:
        """The merged task vector, unscaled."""
        low, high = self._votes(state)
        positive = high.ge_(0.0) if totals.scalars["majority"] > 0 else low.gt_(0.0)  # 1 or 0
        if self.combine == "max":
            return torch.lerp(state["max-"], state["max+"], positive)  # one or the other
        merged = torch.lerp(state["N"], state["P"], positive)
        if self.combine == "sum":
            return merged
        weight = torch.lerp(state["c-"], state["c+"], positive)
        return merged.div_(weight.clamp_min_(NOBODY)).mul_(THOUSANDTHS)


def _cleared(state: State) -> State:
    """The accumulators without what rounding left where nobody has a value any more."""
    up, down = state["c+"].gt(NOBODY).float(), state["c-"].gt(NOBODY).float()
    return {"P": state["P"] * up, "N": state["N"] * down, "c+": state["c+"] * up, "c-": state["c-"] * down}
