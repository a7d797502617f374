"""TIES of what is merged already and the new expert."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from projector.algebra.selection import coarse, fine, just_below, kept, threshold, upper_bits
from projector.method import Contribution, Method, State, Sums, Survey, Totals, param
from projector.spec import TensorSpec


@dataclass(frozen=True)
class ContinualTies(Method):
    """Merges the running vector A and the expert's tau at each arrival as TIES does.

    Both are trimmed to the `density` of their values that are largest in magnitude over the whole model. Each weight
    elects the sign of the sum of the two; where they cancel out exactly, the sign that most weights of the model
    elected, minus where these are even. A becomes the mean of those of the two values that have the elected sign. The
    expert is read four times: twice for the two thresholds, once for the majority of signs, once for the fold.

    The first expert leaves its trimmed tau. `scale` acts where the weights are read out, not on A: both sides of an
    election are unscaled task vectors, however many experts came before. The baseline released with OPCM differs: it
    adds scale * TIES(what it deployed - base, tau) to what it deployed, which counts the past twice.
    """

    name = "continual_ties"
    formula = "A = TIES(A, tau); base + scale * A"
    paper = "Yadav et al., TIES-merging, arXiv 2306.01708; as a baseline in Tang et al., arXiv 2501.09522"
    rounds = 3
    surveys_state = True

    density: float = param(0.2, "share of a vector's values kept, the largest", low=0, high=1, idle=0)
    scale: float = param(0.5, "factor of A", low=-10, high=10, idle=0)

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Survey:
        pair = {"old": state["A"], "new": delta}
        if not expert.surveys:
            return {key: coarse(x) for key, x in pair.items()}
        if len(expert.surveys) == 1:
            counts = expert.surveys[0]
            return {key: fine(x, upper_bits(counts[key], self._kept(counts[key]))) for key, x in pair.items()}
        total = self._trimmed("old", state["A"], expert).add_(self._trimmed("new", delta, expert))
        return {"signs": total.sign_().sum(dtype=torch.float64)}

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        old, new = self._trimmed("old", state["A"], expert), self._trimmed("new", delta, expert)
        total = old + new
        positive = total >= 0 if expert.surveys[2]["signs"] > 0 else total > 0
        agreeing = torch.where(positive, old.clamp_min(0) + new.clamp_min(0), old.clamp_max(0) + new.clamp_max(0))
        two_agree = old.sign_().mul_(new.sign_()).clamp_min_(0)
        return {"A": agreeing.div_(two_agree.add_(1))}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["A"], alpha=self.scale)

    def workspace(self, spec: TensorSpec) -> int:
        return 8 * spec.numel * 4

    def _kept(self, counts: Tensor) -> int:
        return kept(self.density, int(counts.sum()))

    def _trimmed(self, key: str, x: Tensor, expert: Contribution) -> Tensor:
        first, second = (sums[key] for sums in expert.surveys[:2])
        least = threshold(first, second, self._kept(first))
        return hardshrink(x, just_below(least))
