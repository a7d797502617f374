"""Small charts, worked out here and drawn by a template: lines over the numbers of versions. matplotlib, which draws
those of the report, is not loaded where pages are served.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from projector.text import plain

WIDTH, HEIGHT = 360, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 20
DOTTED = 30  # points of a line whose points are marked


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its points as (version, value); None breaks it. marked: the versions that stand out."""

    name: str
    points: Sequence[tuple[int, float | None]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series in the picture: the line, its dots, and those that stand out with what they say."""

    name: str
    number: int
    line: str
    dots: Sequence[tuple[str, str]]
    marks: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """ticks: (height, what is written there). first, last: the versions at the ends."""

    key: str
    title: str
    about: str
    series: Sequence[Drawn]
    ticks: Sequence[tuple[float, str]]
    first: int
    last: int


def chart(key: str, title: str, about: str, series: Iterable[Series], *, zero: bool = True) -> Chart | None:
    """A chart of those lines that have two points or more; None where there are none. zero: its axis begins there."""
    there = [one for one in series if sum(_finite(value) for _, value in one.points) > 1]
    if not there:
        return None
    known = [(n, value) for one in there for n, value in one.points if value is not None and math.isfinite(value)]
    first, last = min(n for n, _ in known), max(n for n, _ in known)
    least, most = min(value for _, value in known), max(value for _, value in known)
    ticks = _ticks(min(least, 0.0) if zero else least, most)
    low, high = min(ticks[0], least), max(ticks[-1], most)

    def x(n: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (n - first) / max(1, last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / ((high - low) or 1.0)

    return Chart(
        key,
        title,
        f"{about} The latest is {plain(known[-1][1])}; they go from {plain(least)} to {plain(most)}.",
        [_drawn(one, number, x, y) for number, one in enumerate(there, start=1)],
        [(round(y(tick), 1), plain(tick)) for tick in ticks],
        first,
        last,
    )


def _drawn(series: Series, number: int, x, y) -> Drawn:  # type: ignore[no-untyped-def]
    line, pen = [], "M"
    points = []
    for n, value in series.points:
        if value is None or not math.isfinite(value):
            pen = "M"
            continue
        line.append(f"{pen}{x(n):.1f} {y(value):.1f}")
        points.append((n, value))
        pen = "L"
    dots = [(f"{x(n):.1f}", f"{y(value):.1f}") for n, value in points] if len(points) <= DOTTED else []
    marks = [(f"{x(n):.1f}", f"{y(value):.1f}", f"{n}: {plain(value)}") for n, value in points if n in series.marked]
    return Drawn(series.name, (number - 1) % 6 + 1, "".join(line), dots, marks)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ticks(low: float, high: float) -> list[float]:
    """Three or four round numbers around that range."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 3
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * one for one in (1, 2, 2.5, 5, 10) if unit * one >= rough)
    begin = math.floor(low / step)
    return [round(step * n, 12) for n in range(begin, math.ceil(high / step) + 1)]


def outliers(points: Sequence[tuple[int, float | None]], times: float) -> frozenset[int]:
    """The versions whose value is so many times that of the middle one, where there are five or more."""
    values = sorted(value for _, value in points if value is not None and math.isfinite(value))
    if len(values) < 5:
        return frozenset()
    usual = values[len(values) // 2]
    return frozenset(n for n, value in points if value is not None and value > times * usual)
