"""Which features become one: greedily the most correlated, across the two models and within each."""

from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import one_thread
from projector.errors import BadParameter

NEVER = -torch.inf


@dataclass(frozen=True)
class Pairing:
    """Which feature of the zipped model each one becomes.

    groups: (models, n), numbers below n. shares: (models, n), how much of the zipped feature it makes up; those of one
    zipped feature sum to 1. merit: the mean correlation at which features were put together.

    The paper's merge matrix M (n, 2n) has shares[i, f] at (groups[i, f], i n + f); its unmerge matrix U (2n, n) a 1 at
    (i n + f, groups[i, f]).
    """

    groups: Tensor
    shares: Tensor
    merit: float = 1.0

    @property
    def size(self) -> int:
        return self.groups.shape[1]

    def merge(self, tensor: Tensor, dim: int, model: int) -> Tensor:
        """That model's part of M's product along an axis: what makes features makes zipped ones."""
        return self._summed(tensor * self._along(self.shares[model], tensor, dim), dim, self.groups[model])

    def unmerge(self, tensor: Tensor, dim: int, model: int, each: int = 1) -> Tensor:
        """That model's part of U's product along an axis: what reads features reads zipped ones. each: how many entries
        of the axis, side by side, stand for one feature.
        """
        groups = (self.groups[model][:, None] * each + torch.arange(each)).reshape(-1)
        return self._summed(tensor, dim, groups)

    def counted(self) -> dict[str, int]:
        """How many zipped features are of both models, of several features of one, and of one feature alone."""
        per_model = torch.stack([torch.bincount(one, minlength=self.size) for one in self.groups])
        across = (per_model > 0).all(dim=0)
        alone = per_model.sum(dim=0) == 1
        within = ~(across | alone)
        return {"across": int(across.sum()), "within": int(within.sum()), "alone": int(alone.sum())}

    @staticmethod
    def _along(values: Tensor, tensor: Tensor, dim: int) -> Tensor:
        return values.to(tensor.dtype).reshape([-1 if axis == dim else 1 for axis in range(tensor.ndim)])

    @staticmethod
    def _summed(tensor: Tensor, dim: int, groups: Tensor) -> Tensor:
        return torch.zeros_like(tensor).index_add_(dim, groups, tensor)


@one_thread()
def pair(correlation: Tensor, weights: tuple[float, float] = (0.5, 0.5), alpha: float = 0, beta: float = 1) -> Pairing:
    """Zips the 2n features of `correlation` (2n, 2n), the first model's before the second's, into n.

    Each of n steps puts the two together that correlate most, in favour of the earlier among equals. What came of them
    correlates with others as the less correlated of both does, times alpha; 0: it is put together with nothing more.
    beta: the share of the n steps that may lie within one model, half of them in each; 0 permutes one model to the
    other. For this, what came of both models counts as of the model of its first feature, as in the authors' code.

    weights: how much a feature of each model counts in a mean. Raises BadParameter.
    """
    if not 0 <= alpha <= 1 or not 0 <= beta <= 1:
        raise BadParameter(
            f"alpha = {alpha} and beta = {beta} are not both in [0, 1]", "give each a number from 0 to 1"
        )
    n = len(correlation) // 2
    like = correlation.clone()
    like.fill_diagonal_(NEVER)
    origin = torch.arange(2 * n) // n
    budget = [int((n // 2) * beta + 1e-9)] * 2
    for model in range(2):
        if budget[model] == 0:
            like[model * n : model * n + n, model * n : model * n + n] = NEVER
    which = like.argmax(dim=1)
    best = like.gather(1, which[:, None])[:, 0]
    into = torch.arange(2 * n)  # which earlier feature it was put together with
    merit = 0.0
    for _ in range(n):
        one = int(best.argmax())
        one, other = sorted((one, int(which[one])))
        merit += float(like[one, other])
        into[other] = one
        joined = alpha * torch.minimum(like[one], like[other]) if alpha > 0 else torch.full_like(best, NEVER)
        joined[[one, other]] = NEVER
        like[one], like[:, one] = joined, joined
        like[other] = like[:, other] = NEVER
        again = (which == one) | (which == other)
        again[one] = True
        if origin[one] == origin[other]:
            budget[origin[one]] -= 1
            if budget[origin[one]] == 0:
                own = (origin == origin[one]).nonzero()[:, 0]
                like[own[:, None], own] = NEVER
                again |= origin == origin[one]
        better = (like[one] > best) | ((like[one] == best) & (one < which))
        best, which = torch.where(better, like[one], best), torch.where(better, one, which)
        rows = again.nonzero()[:, 0]
        which[rows] = like[rows].argmax(dim=1)
        best[rows] = like[rows].gather(1, which[rows, None])[:, 0]
        best[other] = NEVER
        origin[other] = -1
    return _pairing(into, weights, merit / n if n else 1.0)


def _pairing(into: Tensor, weights: tuple[float, float], merit: float) -> Pairing:
    """Zipped features stand in the order of the first feature of each: the first model's keep theirs."""
    n = len(into) // 2
    while not torch.equal(into[into], into):
        into = into[into]
    groups = torch.unique(into, return_inverse=True)[1]  # sorted
    counts = torch.tensor(weights, dtype=torch.float64).repeat_interleave(n)
    together = torch.zeros(n, dtype=torch.float64).index_add_(0, groups, counts)
    return Pairing(groups.reshape(2, n), (counts / together[groups]).reshape(2, n), merit)
