"""PCB-Merging: parameters compete, and the winners are averaged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.selection import coarse, fine, threshold, upper_bits
from projector.method import Contribution, Method, State, Sums, Survey, Totals, param
from projector.spec import TensorSpec

OUTLIERS = 1e-4  # the share of magnitudes at either end that is clamped
LEAST_SHARE = 1e-12  # what the shares of a weight are divided by at the least


@dataclass(frozen=True)
class Pcb(Method):
    """Scores every value within its task vector and across them, and averages the best.

    With T experts, S the sum of their task vectors, and all of one task vector's values taken as one vector:

        a_i = |tau_i|, its smallest and largest 1e-4 clamped
        score_i = exp(T norm(a_i)^2) * tanh(tau_i S)      norm(x) = (x - min x) / (max x - min x)
        share_i = norm(score_i), where what lies below the `ratio` largest scores is raised to the least of them
        merged = scale * sum share_i sign(tau_i) a_i / sum share_i

    as in the authors' released code (there the two sums run over all experts at once). An arriving expert is scored
    with the T and S of that moment, which the experts after it would have changed: the fold is an approximation that
    depends on the order. A second pass, which `rebuild` makes, scores every expert with the final T and S: that is the
    offline method. norm(score) is the same whatever the scores are multiplied by, so exp(-T) is, and nothing overflows.

    The model is read five times for each expert: twice for the limits of a_i, twice for those of the scores.

    The code clamps at least the largest magnitude to the one below it, here 3 to 2:

    >>> from projector.laws.trial import merge
    >>> base, expert = {"w": torch.zeros(4)}, {"w": torch.tensor([1.0, -2.0, 3.0, 0.5])}
    >>> merge(Pcb(ratio=0.75), base, [expert])[0]["w"]
    tensor([ 0., -2.,  2.,  0.])
    """

    name = "pcb"
    formula = (
        "base + scale * sum share_i sign(tau_i) a_i / sum share_i, a_i: |tau_i| clamped at its 1e-4 quantiles, "
        "share_i: norm(max(score_i, its ratio's least)), score_i: exp(T norm(a_i)^2) tanh(tau_i S)"
    )
    paper = "Du et al., PCB-Merging, arXiv 2410.02396"
    approximate = True
    rounds = 4
    surveys_state = True

    ratio: float = param(0.1, "share of a task vector's values that take part, the best scored", low=0, high=1, idle=0)
    scale: float = param(1.0, "factor of the merged task vector", low=-10, high=10, idle=0)

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {key: TensorSpec(spec.name, spec.shape, torch.float32) for key in ("S", "shared", "shares")}

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    @property
    def one_sweep(self) -> bool:
        return True

    def workspace(self, spec: TensorSpec) -> int:
        return 6 * spec.numel * 8

    def second_pass(self, experts: int) -> Method:
        return _SecondPass(self.ratio, self.scale, experts)

    def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Survey:
        if not expert.surveys:
            return {"magnitudes": coarse(delta)}
        counts = expert.surveys[0]["magnitudes"]
        if len(expert.surveys) == 1:
            low, high = _outliers(counts)
            return {"low": fine(delta, upper_bits(counts, low)), "high": fine(delta, upper_bits(counts, high))}
        score = self._score(state, delta, expert)
        sides = {"up": score.clamp_min(0), "down": score.clamp_max(0)}
        if len(expert.surveys) == 2:
            return {**{side: coarse(x) for side, x in sides.items()}, "negative": (score < 0).sum()}
        found = {}
        for name, k in (("least", self._kept(counts)), ("best", 1)):
            side, place = _side(expert.surveys[2], k)
            found[name] = fine(sides[side], upper_bits(expert.surveys[2][side], place))
        return found

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        kept = self._kept(expert.surveys[0]["magnitudes"])
        least, best = _score_of(expert, "least", kept), _score_of(expert, "best", 1)
        share = self._score(state, delta, expert).double().clamp_min_(least).sub_(least)
        if best > least:
            share.div_(best - least)
        clamped = delta.double().sign_().mul_(delta.double().abs_().clamp_(*_limits(expert)))
        shared, shares = self._shares(state, expert)
        return {
            "S": self._sum(state, delta),
            "shared": shared + clamped.mul_(share).to(torch.float32),
            "shares": shares + share.to(torch.float32),
        }, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["shared"] / state["shares"].clamp_min(LEAST_SHARE), alpha=self.scale)

    def _score(self, state: State, delta: Tensor, expert: Contribution) -> Tensor:
        """exp(T norm(a)^2 - T) * tanh(tau S), in float32: what was ranked is what is compared."""
        low, high = _limits(expert)
        count = self._count(expert)
        own = delta.double().abs_().clamp_(low, high).sub_(low)
        if high > low:
            own.div_(high - low)
        own.square_().sub_(1).mul_(count).exp_()
        across = self._sum(state, delta).double().mul_(delta).tanh_()
        return own.mul_(across).to(torch.float32)

    def _kept(self, magnitudes: Tensor) -> int:
        """How many of the values take part, with the one that marks the bound, whose share is zero."""
        count = int(magnitudes.sum())
        return max(1, count - int(count * (1 - self.ratio)))

    def _sum(self, state: State, delta: Tensor) -> Tensor:
        return state["S"] + delta

    def _count(self, expert: Contribution) -> int:
        return expert.index

    def _shares(self, state: State, expert: Contribution) -> tuple[Tensor, Tensor]:
        return state["shared"], state["shares"]


@dataclass(frozen=True)
class _SecondPass(Pcb):
    """The same over experts that are all in S already, from a state whose shares are those of the first pass."""

    approximate = False

    experts: int = param(1, "how many experts there are", low=1)

    def _sum(self, state: State, delta: Tensor) -> Tensor:
        return state["S"].clone()

    def _count(self, expert: Contribution) -> int:
        return self.experts

    def _shares(self, state: State, expert: Contribution) -> tuple[Tensor, Tensor]:
        if expert.index == 1:
            return torch.zeros_like(state["shared"]), torch.zeros_like(state["shares"])
        return state["shared"], state["shares"]


def _outliers(magnitudes: Tensor) -> tuple[int, int]:
    """Which of the magnitudes, counted from the largest, are the lower and the upper limit."""
    count = int(magnitudes.sum())
    return count - int(count * OUTLIERS), count - max(0, int(count * (1 - OUTLIERS) - 1))


def _limits(expert: Contribution) -> tuple[float, float]:
    """Between which magnitudes a task vector is clamped."""
    counts, digits = expert.surveys[0]["magnitudes"], expert.surveys[1]
    low, high = _outliers(counts)
    return threshold(counts, digits["low"], low), threshold(counts, digits["high"], high)


def _side(scores: Survey, k: int) -> tuple[str, int]:
    """Where the k-th largest score is: among those above zero or those below it, and at which place by magnitude."""
    count = int(scores["up"].sum())
    return ("up", k) if k <= count - int(scores["negative"]) else ("down", count - k + 1)


def _score_of(expert: Contribution, name: str, k: int) -> float:
    """The k-th largest score, whose lower bits were counted under `name`."""
    scores, digits = expert.surveys[2:]
    side, place = _side(scores, k)
    found = threshold(scores[side], digits[name], place)
    return found if side == "up" else -found
