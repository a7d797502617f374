"""Charts as SVG to stand in a page: they take its text's font and its colours, light and dark, and load nothing.

matplotlib draws them in colours that stand for others, which are then replaced by those variables of the page's style
that `COLOURS` names. The same arguments give the same bytes.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from daemon.errors import DaemonError, Reason
from projector.text import plain, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, GOOD, BAD = "#0000f1", "#0000f2", "#0000f3", "#0000f4", "#0000f5"
SERIES = ("#0000e1", "#0000e2", "#0000e3", "#0000e4", "#0000e5", "#0000e6")
DASHES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (1, 1)))  # lines differ without colour, too
COLOURS = {
    INK: "ink",
    SOFT: "soft",
    LINE: "line",
    GOOD: "river",
    BAD: "bad",
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)},
}
WIDTH, HEIGHT, POINTS = 390, 215, 72  # of a chart, in points, of which an inch has 72
CELL, CELL_WIDTH = 17, 34  # of a heat map, in points
LONGEST_NAME = 24
STRONGEST = 0.6  # opacity: the number in a cell must be legible on it
LEAST_SPAN = 0.1  # of an axis, as a share of what is on it
LABELLED = 12  # points of a line with markers

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; a None breaks it. hollow: the places of points that are marked as not live."""

    name: str
    xs: Sequence[float]
    ys: Values
    hollow: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Cells:
    """A heat map's cells, row by row: what is written in each, and its shade in [-1, 1], bad to good; None is empty."""

    rows: Sequence[str]
    columns: Sequence[str]
    texts: Sequence[Sequence[str]]
    shades: Sequence[Values]


def require() -> None:
    """Raises DaemonError where matplotlib is not installed."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of a cache of fonts that it makes the first time
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise DaemonError(
            Reason.UNKNOWN,
            "the report's charts are drawn by matplotlib, which is not installed",
            "`pip install 'mainstem[report]'`, or print the figures with `mainstem report --json`",
        ) from None


def lines(key: str, title: str, about: str, series: Sequence[Line], x: str, y: str, zero: bool = False) -> str:
    """Lines over one axis. `key`: letters that no other chart of the page has. `about`: what it shows, for who does
    not see it. zero: the other axis begins there.
    """
    with _drawing() as figure:
        axes = _axes(figure, x, y)
        for number, line in enumerate(series):
            colour, dash = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
            known = [(place, float(value)) for place, value in zip(line.xs, line.ys, strict=True) if value is not None]
            marker = "o" if len(known) <= LABELLED else ""
            axes.plot(
                line.xs,
                _broken(line.ys),
                color=colour,
                linestyle=dash,
                marker=marker,
                markersize=3.5,
                label=short(line.name),
            )
            for place in line.hollow:
                if (at := line.ys[place]) is not None:
                    axes.plot([line.xs[place]], [at], color=colour, marker="x", markersize=7, linestyle="")
        if zero:
            axes.set_ylim(bottom=0)
        _legend(figure, series)
        return _svg(figure, key, title, about)


def path(key: str, title: str, about: str, series: Sequence[Line], x: str, y: str) -> str:
    """Points that follow one another in a plane; where each line begins is a ring, where it ends a full circle."""
    with _drawing() as figure:
        axes = _axes(figure, x, y)
        for number, line in enumerate(series):
            colour, dash = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
            ys = _broken(line.ys)
            axes.plot(line.xs, ys, color=colour, linestyle=dash, label=short(line.name))
            axes.plot(line.xs[:1], ys[:1], color=colour, marker="o", fillstyle="none", markersize=6, linestyle="")
            axes.plot(line.xs[-1:], ys[-1:], color=colour, marker="o", markersize=6, linestyle="")
        axes.set_xlim(_room(axes.get_xlim()))
        axes.set_ylim(_room(axes.get_ylim()))
        _legend(figure, series)
        return _svg(figure, key, title, about)


def heat_map(key: str, title: str, about: str, cells: Cells) -> str:
    """Cells with their numbers; teal is good, red is bad, and as strong as `shades` says."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    rows, columns = len(cells.rows), len(cells.columns)
    with _drawing() as figure:
        names = max((len(short(name)) for name in cells.rows), default=0)
        heads = max((len(short(name)) for name in cells.columns), default=0)
        left, top = 6 * names + 10, (18 if heads <= 5 else 5 * heads + 12)
        width, height = left + CELL_WIDTH * columns + 4, top + CELL * rows + 4
        figure.set_layout_engine("none")
        figure.set_size_inches(width / POINTS, height / POINTS)
        axes = figure.add_axes((left / width, 4 / height, CELL_WIDTH * columns / width, CELL * rows / height))
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.set_xticks([c + 0.5 for c in range(columns)], [short(name) for name in cells.columns])
        axes.set_yticks([r + 0.5 for r in range(rows)], [short(name) for name in cells.rows])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelrotation=0, labelcolor=SOFT)
        if heads > 5:
            axes.tick_params(axis="x", labelrotation=90)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for r in range(rows):
            for c in range(columns):
                shade = cells.shades[r][c]
                strength = min(1.0, abs(shade)) * STRONGEST if shade is not None else 0.0
                face = to_rgba(BAD if (shade or 0) < 0 else GOOD, round(strength, 3))
                axes.add_patch(Rectangle((c, r), 1, 1, facecolor=face, edgecolor=LINE, linewidth=0.5))
                axes.text(c + 0.5, r + 0.5, cells.texts[r][c], ha="center", va="center_baseline", color=INK, fontsize=8)
        return _svg(figure, key, title, about)


def short(name: str, most: int = LONGEST_NAME) -> str:
    """A foreign name as it may stand in a chart: one line, at most so many letters."""
    known = shown(name)
    return known if len(known) <= most else f"{known[: most - 1]}…"


@contextmanager
def _drawing() -> "Iterator[Figure]":
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "mainstem",  # and ids stay the same
        "text.parse_math": False,  # a name may have a $ in it
        "text.usetex": False,
        "font.family": "sans-serif",
        "font.size": 10,
        "lines.linewidth": 1.6,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": False,
    }
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # of letters that its own font lacks: the page's font draws them
        matplotlib.rcdefaults()  # whatever somebody has in a matplotlibrc
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(WIDTH / POINTS, HEIGHT / POINTS), dpi=POINTS, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def _axes(figure: "Figure", x: str, y: str) -> "Axes":
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    axes.set_xlabel(short(x, 60), color=SOFT)
    axes.set_ylabel(short(y, 40), color=SOFT)
    axes.grid(visible=True, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=SOFT)
    if x == "version":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02, y=0.08)
    for side, spine in axes.spines.items():
        spine.set_color(LINE)
        spine.set_visible(side in ("left", "bottom"))
    return axes


def _broken(values: Values) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _room(limits: tuple[float, float]) -> tuple[float, float]:
    """The limits of an axis, no closer than makes a change of one part in a hundred look like one."""
    low, high = limits
    missing = max(0.0, LEAST_SPAN * max(abs(low), abs(high)) - (high - low))
    return low - missing / 2, high + missing / 2


def _legend(figure: "Figure", series: Sequence[Line]) -> None:
    if len(series) > 1 and len(series) <= len(SERIES) * 2:
        names = max(len(short(line.name)) for line in series)
        columns = max(1, min(len(series), WIDTH // (6 * names + 44)))
        figure.legend(loc="outside upper left", frameon=False, labelcolor=INK, ncols=columns, handlelength=2.6)


def _svg(figure: "Figure", key: str, title: str, about: str) -> str:
    """The drawing, in the page's colours and font, with ids of its own, as wide as the page has room."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    width, height = (plain(72 * inches, 6) for inches in figure.get_size_inches())
    opening = (
        f'<svg class="chart" role="img" aria-labelledby="{key}-title {key}-about" viewBox="0 0 {width} {height}" '
        f'style="--wide: {width}px" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">\n'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-about">{escape(about)}</desc>\n'
    )
    drawn = opening + drawn[drawn.index(">") + 1 :].lstrip()
    drawn = re.sub(r'(<\w+ [^>]*?)\bid="(?!' + key + r'-)([^"]+)"', rf'\1id="{key}-\2"', drawn)
    drawn = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", drawn)
    drawn = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{key}-\1"', drawn)
    drawn = re.sub(
        r"<metadata.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawn, flags=re.DOTALL
    )  # they would hold for the whole page
    drawn = re.sub(r"font-family: [^;\"]*; ", "", drawn)
    return re.sub(r"#0000[ef]\d", lambda found: f"var(--{COLOURS[found[0]]})", drawn)
