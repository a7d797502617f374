"""What a page is made of: sections with charts and tables, each number as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from projector.text import plain

POINTS = 200  # of a line: of more, as many are picked evenly, the first and the newest among them
ROWS = 100  # of a table
HALF_PAGE = 10  # columns of a heat map

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, all as long as `columns`. words: its cells are sentences rather than numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing and its numbers. columns: of a heat map, which is not made smaller where it finds no room."""

    caption: str
    svg: Markup
    table: Table
    columns: int = 0

    @property
    def place(self) -> str:
        """The classes of the page's style that say how much room it takes."""
        return " ".join(["cells"] * bool(self.columns) + ["full"] * (self.columns > HALF_PAGE))


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. missing: why there is nothing, or not all, to show, and what to do about it."""

    key: str
    title: str
    lead: str = ""
    missing: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    terms: Sequence[tuple[str, str]] = ()


def picked(items: Sequence[Item], most: int) -> list[Item]:
    """As many of them, evenly, the first and the last among them.

    >>> picked(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def newest(rows: Sequence[Item]) -> list[Item]:
    """The last rows of a table, newest first."""
    return list(rows[::-1][:ROWS])


def number(value: float | None) -> str:
    """A figure as people read it; a dash where it is not known."""
    return "-" if value is None else plain(value)


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    return "-" if value is None else f"{'+' if value > 0 else ''}{plain(value)}"


def scores(values: Sequence[float | None]) -> list[str]:
    """Scores of one task, to stand in a row: with the same decimals, where none is above 1; nothing for None."""
    small = max((abs(value) for value in values if value is not None), default=0.0) <= 1
    return ["" if value is None else f"{value:.3f}" if small else plain(value) for value in values]
