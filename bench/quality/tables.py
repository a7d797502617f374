"""Figures as a page has them."""

from collections.abc import Mapping
from textwrap import wrap


def percent(value: float) -> str:
    """
    >>> percent(0.98765)
    '98.8'
    """
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference, in points.

    >>> points(-0.0123)
    '-1.2'
    """
    return f"{100 * value:+.1f}"


def spread(found: Mapping[str, float | None]) -> str:
    """A mean, and its deviation where there are several.

    >>> spread({"mean": 0.9, "stdev": 0.011})
    '90.0 ± 1.1'
    """
    mean, deviation = found["mean"], found["stdev"]
    assert mean is not None
    return percent(mean) + (f" ± {percent(deviation)}" if deviation is not None else "")


def item(words: str) -> list[str]:
    """The lines of one item of a list."""
    return wrap(f"- {words}", 118, subsequent_indent="  ", break_on_hyphens=False)
