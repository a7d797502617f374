"""Model breadcrumbs, merged as TIES merges."""

from dataclasses import dataclass

from torch import Tensor

from projector.method import Contribution, Method, param
from projector.methods._thinning import Thinning
from projector.methods.breadcrumbs import crumbs
from projector.methods.ties import Ties
from projector.spec import TensorSpec


@dataclass(frozen=True)
class BreadcrumbsTies(Thinning):
    """Thins out task vectors as breadcrumbs does, then elects signs and merges as ties does.

    A tensor is taken whole, which for an embedding of 128256 x 4096 is up to 37 GiB of memory; `init` refuses one that
    does not fit, with both numbers.
    """

    name = "breadcrumbs_ties"
    formula = "base + scale * (mean, sum or max of the w_i mask_i tau_i with the sign of their sum)"
    paper = "Davari and Belilovsky, Model breadcrumbs, arXiv 2312.06795; Yadav et al., TIES-merging, arXiv 2306.01708"

    gamma: float = param(0.01, "share of a tensor's values dropped as outliers", low=0, high=1, idle=1)
    density: float = param(0.9, "share of the others kept, the largest", low=0, high=1, idle=0)
    combine: str = param("mean", "what the values of the elected sign become", choices=("mean", "sum", "max"))
    scale: float = param(0.3, "factor of the merged task vector", low=-10, high=10, idle=0)

    @property
    def grows(self) -> bool:
        return self.combine == "sum"

    @property
    def merging(self) -> Method:
        return Ties(density=1.0, combine=self.combine, scale=self.scale)

    def thin(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Tensor:
        return crumbs(delta, self.gamma, self.density)
