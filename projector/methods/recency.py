"""The average in which an expert's weight depends on its place in the line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, fsum, log, sqrt

import torch
from torch import Tensor

from projector.errors import BadParameter
from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.spec import TensorSpec

# f(i) / f(t), which does not overflow where f(i) does
FORWARD: Mapping[str, Callable[[int, int], float]] = {
    "linear": lambda i, t: i / t,
    "sqrt": lambda i, t: sqrt(i / t),
    "log": lambda i, t: log(i + 1) / log(t + 1),
    "quadratic": lambda i, t: (i / t) ** 2,
    "cubic": lambda i, t: (i / t) ** 3,
    "exp": lambda i, t: 2.0 ** (i - t),
}

# c_0 ... c_d of n^d = sum_k c_k C(n + k - 1, k)
REVERSE: Mapping[str, Sequence[int]] = {
    "reverse_linear": (0, 1),
    "reverse_quadratic": (0, -1, 2),
    "reverse_cubic": (0, 1, -6, 6),
}

ENDLESS = ("reverse_sqrt", "reverse_log")


@dataclass(frozen=True)
class Recency(Method):
    """The average of the experts, the newest counting most, or the first.

    f(i) is i, sqrt(i), log(i + 1), i^2, i^3 or 2^i, and one running average is kept: it moves the share f(t) / sum f
    of the way to each new expert, with exp soon one half of it. A reverse scheme gives expert i the weight
    (t - i + 1)^d once t experts are there, so that every weight changes with every arrival; it keeps d + 1 sums, each
    adding up the one before (S_0 sums tau, S_1 sums S_0, ...). S_k then holds expert i C(n + k - 1, k) times,
    n = t - i + 1, and n^d is a combination of these. The weights sqrt(n) and log(n + 1) are a combination of no fixed
    number of sums; reverse_sqrt and reverse_log are refused.

    After task vectors of 1, 2 and 6 a weight of the base stands (1*1 + 2*2 + 3*6) / 6 higher:

    >>> stream = [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([6.0])]
    >>> spec, recency = TensorSpec("w", (1,), torch.float32), Recency(scheme="linear")
    >>> state, totals = {"A": torch.zeros(1)}, Totals()
    >>> for t, delta in enumerate(stream, start=1):
    ...     state, sums = recency.update(state, delta, spec, Contribution(t))
    ...     totals = recency.tally(totals, sums, Contribution(t))
    >>> f"{recency.read(torch.tensor([10.0]), state, totals, spec).item():.4f}"
    '13.8333'
    """

    name = "recency"
    formula = "base + sum f(i) tau_i / sum f(i), or with f(t - i + 1) reversed"
    paper = "Dziadzio et al., TIME, arXiv 2412.06712"

    scheme: str = param("linear", "how f grows with the place", choices=(*FORWARD, *REVERSE))

    def __post_init__(self) -> None:
        if self.scheme in ENDLESS:
            raise BadParameter(
                f"recency.scheme cannot be {self.scheme!r}: all its weights change with each arrival, and no fixed "
                "number of sums follows them",
                f"take {', '.join(REVERSE)}, which d + 1 sums follow exactly, or a scheme that is not reversed",
            )
        super().__post_init__()

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        keys = [f"S{k}" for k, _ in enumerate(REVERSE[self.scheme])] if self.scheme in REVERSE else ["A"]
        return {key: TensorSpec(spec.name, spec.shape, torch.float32) for key in keys}

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        if self.scheme in FORWARD:
            return {"A": torch.lerp(input=state["A"], end=delta, weight=_newest_share(self.scheme, expert.index))}, {}
        sums, added = {}, delta
        for key in self.slots(spec):
            sums[key] = added = torch.add(state[key], added)
        return sums, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        if self.scheme in FORWARD:
            return torch.add(base, state["A"])
        c, t = REVERSE[self.scheme], totals.experts
        weights = sum(c_k * comb(t + k, k + 1) for k, c_k in enumerate(c))  # n^d over n = 1 ... t
        merged = base.clone()
        for k, c_k in enumerate(c):
            merged.add_(state[f"S{k}"], alpha=c_k / weights if t else 0.0)
        return merged


@lru_cache(maxsize=16)
def _newest_share(scheme: str, t: int) -> float:
    """f(t) / (f(1) + ... + f(t))."""
    return 1 / fsum(FORWARD[scheme](i, t) for i in range(1, t + 1))
