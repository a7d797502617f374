"""Model breadcrumbs: drop outliers and small values of each tensor, sum the rest."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import hardshrink

from projector.algebra.selection import just_below, kth_largest
from projector.method import Contribution, Method, param
from projector.methods._thinning import Thinning
from projector.methods.task_arithmetic import TaskArithmetic
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Breadcrumbs(Thinning):
    """Adds up the values of middling magnitude of each tensor of a task vector.

    Of n values the int(gamma * n) of largest magnitude are outliers, n - 1 at the most; of the m others the
    round(density * m) largest are kept, 1 at the least. So a tensor of fewer than 1 / gamma values has no outliers, and
    every tensor keeps something. A value equal to the largest or to the smallest one that is kept is kept too. A tensor
    is taken whole, which for an embedding of 128256 x 4096 is about 18 GiB of memory; `init` refuses one that does not
    fit, with both numbers.
    """

    name = "breadcrumbs"
    formula = "base + scale * sum w_i mask_i tau_i, mask: neither the largest nor the smallest of a tensor"
    paper = "Davari and Belilovsky, Model breadcrumbs, arXiv 2312.06795"

    gamma: float = param(0.01, "share of a tensor's values dropped as outliers", low=0, high=1, idle=1)
    density: float = param(0.9, "share of the others kept, the largest", low=0, high=1, idle=0)
    scale: float = param(0.3, "factor of the sum", low=-10, high=10, idle=0)

    @property
    def grows(self) -> bool:
        return True

    @property
    def merging(self) -> Method:
        return TaskArithmetic(scale=self.scale)

    def thin(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Tensor:
        return crumbs(delta, self.gamma, self.density)


def crumbs(delta: Tensor, gamma: float, density: float) -> Tensor:
    """`delta` without its outliers and its smallest values: the rule of Breadcrumbs, for one tensor."""
    n = delta.numel()
    outliers = min(int(gamma * n), n - 1)
    count = max(1, round(density * (n - outliers)))
    largest, least = kth_largest(delta, outliers + 1, outliers + count) if n else (0.0, 0.0)
    return hardshrink(delta, just_below(least)).sub_(hardshrink(delta, largest))
