"""A report as one HTML file: nothing is loaded from elsewhere, nothing is run, every foreign name is text.

Each section says what it shows in a sentence, or why there is nothing to show; each chart has its numbers in a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from daemon.notation import called
from daemon.reports.report import charts, merged, scored
from daemon.reports.report.gathering import HeadReport, Report
from daemon.reports.report.parts import POINTS, ROWS, Section, number, signed
from daemon.templating import asset, html_environment
from projector.text import listed


def render(report: Report, more: Sequence[Section] = ()) -> str:
    """The file's text, the same for the same report. more: sections to put first. Raises DaemonError where charts
    cannot be drawn.
    """
    charts.require()
    first = report.heads[0]
    return _ENVIRONMENT.get_template("report.html").render(
        title=f"{called(first.name, first.live)} · mainstem report",
        style=asset("page.css", "report.css"),
        report=report,
        made_at=report.made_at.strftime("%Y-%m-%d %H:%M:%S UTC"),
        cards=[_card(head) for head in report.heads],
        counts=[(str(status), f"{count:,}") for status, count in report.counts.items()],
        sections=[*more, *sections(report)],
        covered=_covered(report),
    )


def sections(report: Report) -> list[Section]:
    """What the page says of a home, in order."""
    return [
        scored.figures(report),
        scored.matrix(report),
        scored.over_time(report),
        merged.vectors(report),
        merged.overlap(report),
        merged.costs(report),
        scored.verdicts(report),
    ]


def _covered(report: Report) -> str:
    beyond = [called(head.name, head.arrivals[0].number) for head in report.heads if not head.whole]
    if not beyond:
        return f"Every version is in it; lines show {POINTS} of them at the most, tables {ROWS}."
    return (
        f"Of each head the newest {report.window:,} versions are in it, and the base: it begins with {listed(beyond)}. "
        f"Lines show {POINTS} of them at the most, tables {ROWS}; --last takes in more."
    )


@dataclass(frozen=True, slots=True)
class _Card:
    live: str
    method: str
    params: str
    lines: Sequence[str]


def _card(head: HeadReport) -> _Card:
    params = ", ".join(f"{name} {value}" for name, value in head.params.items() if not isinstance(value, list))
    lines = []
    if head.live != head.newest:
        lines.append(f"the newest is {called(head.name, head.newest)}")
    if head.found and head.found.accumulation is not None:
        gain = "" if head.found.held_in_gain is None else f", {signed(head.found.held_in_gain)} over the base"
        lines.append(f"{called(head.name, head.found.number)}: mean score {number(head.found.accumulation)}{gain}")
    return _Card(called(head.name, head.live), head.method, params, lines)


_ENVIRONMENT = html_environment()
