"""The correlations of two models' features, summed up over batches: memory for (2n, 2n), however many batches come."""

import torch
from torch import Tensor

from projector.errors import BadValues, Reason

FEWEST_ROWS = 32  # of fewer, chance alone correlates features by more than a sixth
DEAD = 1e-12  # of a feature's mean square: with no more variance than that it is constant but for rounding


class Moments:
    """Mean and centred second moment of the features of several models at one place, in float64.

    >>> moments = Moments()
    >>> moments.add([torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [3.0]])])
    >>> moments.correlation(fewest=2).round(decimals=6)
    tensor([[ 1., -1.],
            [-1.,  1.]], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.rows = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._second = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: list[Tensor]) -> None:
        """Takes a batch: of each model (rows, n), of the same inputs. Raises BadValues where they are not finite."""
        rows = torch.cat([one.to("cpu", torch.float64) for one in features], dim=1)  # (rows, 2n)
        if not rows.isfinite().all():
            number = int((~rows.isfinite()).any(dim=0).nonzero()[0])
            which, at = divmod(number, features[0].shape[1])
            raise BadValues(
                Reason.NOT_FINITE,
                f"feature {at} of model {which + 1} is NaN or infinite on the calibration data",
                "find which input or which model makes it so, and leave that out",
            )
        if not self.rows:
            self._mean = torch.zeros(rows.shape[1], dtype=torch.float64)
            self._second = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        if not len(rows):
            return
        mean = rows.mean(dim=0)
        off = mean - self._mean
        total = self.rows + len(rows)
        centred = rows - mean
        self._second.addmm_(centred.T, centred)
        self._second.addr_(off, off, alpha=self.rows * len(rows) / total)
        self._mean += off * (len(rows) / total)
        self.rows = total

    def dead(self) -> Tensor:
        """True for each feature (2n) that was constant."""
        variance = self._second.diagonal() / max(1, self.rows)
        return variance <= DEAD * (variance + self._mean.square())

    def correlation(self, fewest: int = FEWEST_ROWS) -> Tensor:
        """(2n, 2n), in [-1, 1]; 0 for what is constant. Raises BadValues where there were fewer rows."""
        if self.rows < fewest:
            raise BadValues(
                Reason.BAD_PARAMETER,
                f"the calibration data gave {self.rows} rows of features: of fewer than {fewest}, chance decides",
                "let it yield more samples",
            )
        spread = self._second.diagonal().sqrt()
        spread = torch.where(self.dead(), torch.inf, spread)
        return (self._second / spread[:, None] / spread).clamp_(-1, 1)
