"""The limits on an expert's norm, at their edges."""

import pytest

from daemon.admission import check_norm
from daemon.config import Admission
from daemon.errors import Reason, Refused
from projector.fold import Folded

LIMITS = Admission(max_base_ratio=1.0, max_norm_ratio=100.0)


def refusal(norm: float, base: float = 50.0, mean: float | None = None) -> Reason | None:
    try:
        check_norm(Folded(norm, base, ()), mean, LIMITS)
    except Refused as refused:
        return Reason(refused.reason)
    return None


@pytest.mark.parametrize(
    ("norm", "mean", "reason"),
    [
        (0.0, None, Reason.EQUALS_BASE),
        (0.0, 1.0, Reason.EQUALS_BASE),
        (5e-324, None, None),
        (49.9, None, None),
        (50.0, None, Reason.FOREIGN_BASE),  # as long as the base: the weights are zero, or somebody else's
        (1.0, 0.01, None),
        (1.1, 0.01, Reason.NORM_OUTLIER),
        (1e-9, 10.0, None),  # a small step is no reason to refuse
    ],
)
def test_limits(norm: float, mean: float | None, reason: Reason | None) -> None:
    assert refusal(norm, mean=mean) is reason


def test_a_refusal_says_by_how_much_and_what_to_do() -> None:
    with pytest.raises(Refused, match="120 times as long as those") as refused:
        check_norm(Folded(1.2, 50.0, ()), 0.01, LIMITS)
    assert "admission.max_norm_ratio" in refused.value.hint


def test_a_base_of_zeros_admits_nothing() -> None:
    assert refusal(1.0, base=0.0) is Reason.FOREIGN_BASE


def test_a_raised_limit_lets_it_pass() -> None:
    check_norm(Folded(80.0, 50.0, ()), None, Admission(max_base_ratio=2.0))
