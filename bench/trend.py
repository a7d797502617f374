"""Straight lines through measurements, by least squares."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import linear_regression, mean


@dataclass(frozen=True)
class Trend:
    """A fitted line: its slope, how far it moves over the range as a share of the mean, and R squared."""

    slope: float
    moves: float
    fit: float

    def figures(self) -> dict[str, float]:
        """Ready for JSON."""
        return asdict(self)


def trend(x: Sequence[float], y: Sequence[float]) -> Trend:
    """The line y = slope * x + intercept through at least two points."""
    slope, intercept = linear_regression(x, y)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    whole = sum((b - mean(y)) ** 2 for b in y)
    return Trend(slope, slope * (max(x) - min(x)) / mean(y), 1 - left / whole if whole else 1.0)
