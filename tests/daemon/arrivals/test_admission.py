"""The limits on an expert's norm, at their edges."""

import re
import tomllib
from collections.abc import Sequence

import pytest

from daemon.arrivals.admission import ENOUGH_TO_FLAG, check_norm, oddity, usual_norm
from daemon.config import Admission
from daemon.errors import Reason, Refused
from projector.driver.head import Folded, Norms
from registry.records import Flag

LIMITS = Admission(max_base_ratio=1.0, max_norm_ratio=100.0)


def found(norm: float, base: float = 50.0) -> Folded:
    """Of a model of one matrix."""
    return Folded(*(Norms(length, {"w": length**2}, {"w": 9}) for length in (norm, base)), ())


def refusal(norm: float, base: float = 50.0, norms: Sequence[float] = ()) -> Reason | None:
    try:
        check_norm(found(norm, base), usual_norm(norms), LIMITS)
    except Refused as refused:
        return Reason(refused.reason)
    return None


@pytest.mark.parametrize(
    ("norm", "norms", "reason"),
    [
        (0.0, (), Reason.EQUALS_BASE),
        (0.0, (1.0,) * 5, Reason.EQUALS_BASE),
        (4.9e-5, (), Reason.EQUALS_BASE),  # less than a millionth of the base
        (5.1e-5, (), None),
        (49.9, (), None),
        (50.0, (), Reason.FOREIGN_BASE),  # as long as the base: the weights are zero, or somebody else's
        (1.0, (0.01, 0.01, 0.01), None),
        (1.1, (0.01, 0.01, 0.01), Reason.NORM_OUTLIER),
        (1.1, (0.01, 0.01), None),  # two make no rule
        (1.0, (0.001, 1.0, 1.2), None),  # one odd expert does not move the usual norm
        (0.011, (1.0, 1.0, 1.0), None),
        (0.009, (1.0, 1.0, 1.0), Reason.NORM_OUTLIER),
    ],
)
def test_limits(norm: float, norms: Sequence[float], reason: Reason | None) -> None:
    assert refusal(norm, norms=norms) is reason


def test_a_refusal_says_by_how_much_and_what_to_do() -> None:
    with pytest.raises(Refused, match="120 times as long as is usual") as refused:
        check_norm(found(1.2), usual_norm([0.01] * 3), LIMITS)
    assert "put max_norm_ratio = 130 under [admission]" in refused.value.hint


@pytest.mark.parametrize(
    ("norm", "norms"), [(60.0, ()), (60.0, (0.01,) * 3), (49.0, (1e-7,) * 3), (0.00999, (1.0,) * 3), (1e30, (3.0,) * 3)]
)
def test_what_the_hint_says_lets_it_pass_at_once(norm: float, norms: Sequence[float]) -> None:
    folded = found(norm)
    with pytest.raises(Refused) as refused:
        check_norm(folded, usual_norm(norms), LIMITS)
    said = re.findall(r"(max_\w+_ratio) = (\S+)", refused.value.hint)
    raised = tomllib.loads("".join(f"{name} = {value}\n" for name, value in said))
    assert raised
    check_norm(folded, usual_norm(norms), LIMITS.model_copy(update=raised))


def test_a_base_of_zeros_admits_nothing() -> None:
    assert refusal(1.0, base=0.0) is Reason.FOREIGN_BASE


def test_a_raised_limit_lets_it_pass() -> None:
    check_norm(found(80.0), None, Admission(max_base_ratio=2.0))


@pytest.mark.parametrize(
    ("norm", "norms", "flag"),
    [
        (3.0, (1.0, 1.0, 1.0), None),  # three times as long is not over three times
        (3.01, (1.0, 1.0, 1.0), Flag.LONG),
        (4.6, (0.9, 1.0, 1.3), Flag.LONG),
        (4.6, (0.9, 1.1), Flag.LONG),
        (1.0, (1.0, 4.6), None),  # beside one that nobody could flag
        (4.6, (1.0,), None),  # one makes no rule
        (3.01, (1.0, 1.0, 100.0), Flag.LONG),  # the mean would be 34
        (0.34, (1.0, 1.0, 1.0), None),
        (0.33, (1.0, 1.0, 1.0), Flag.SHORT),
    ],
)
def test_what_is_odd_about_a_norm(norm: float, norms: Sequence[float], flag: Flag | None) -> None:
    found = oddity(norm, usual_norm(norms, ENOUGH_TO_FLAG), LIMITS)
    assert (found.flag if found else None) == flag


def test_what_is_odd_is_said_with_all_three_numbers() -> None:
    found = oddity(4.6, usual_norm([0.9, 1.0, 1.3]), LIMITS)
    assert found and found.hint
    assert "4.6 times" in found.detail and "its norm is 4.6," in found.detail and found.detail.endswith(" 1")
