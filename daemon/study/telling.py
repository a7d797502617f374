"""What came of a study, for people: rows of a table, and the section that its report begins with."""

from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup

from daemon.evaluation.figures import Spread, accumulation
from daemon.reports.report import charts
from daemon.reports.report.charts import Line
from daemon.reports.report.gathering import Overlap, Report
from daemon.reports.report.parts import Chart, Section, Table, number, signed
from daemon.study.results import ACC, Results, Row, told
from projector.text import plain, size

MERIT = ("method", "ACC", "held in", "held out", "share", "BWT", "range", "sensitivity")
PRICE = ("method", "seconds", "memory", "state", "published", "needs", "order")
MOST_LINES = 8
TERMS = (
    ("ACC", "mean score of the tasks that the experts name, ± one standard deviation over the orders"),
    ("held in, held out", "the same over the tasks that are not, and that are held out"),
    ("share", "of what each expert scores by itself in its own task, on average"),
    ("BWT", "what became of a task after its own expert had arrived; below zero is forgetting"),
    ("range", "the worst and the best order"),
    ("seconds", "of an arrival, with this method alone, nothing prepared, without scoring"),
    ("memory", "the most that one arrival took beyond what the process held before (Linux's VmHWM), this method alone"),
    ("state, published", "bytes kept on disk after the last expert"),
    ("needs", "files that every expert must bring"),
    ("order", "whether the order matters by the formula"),
    ("sensitivity", "between the best and the worst mean of the method's own grid"),
)


def merit(found: Results) -> list[list[str]]:
    """How good each method is, by the columns of MERIT, in the order in which they were given."""
    return [_merit(row, row.figure(found.figure or ACC)) for row in found.rows]


def _merit(row: Row, spread: Spread | None) -> list[str]:
    return [
        row.label,
        told(row.acc),
        told(row.held_in),
        told(row.held_out),
        "-" if row.share is None else number(row.share.mean),
        "-" if row.bwt is None else signed(row.bwt.mean),
        "-" if spread is None else f"{plain(spread.least, 4)} to {plain(spread.most, 4)}",
        "-" if row.sensitivity is None else plain(row.sensitivity, 2),
    ]


def price(found: Results) -> list[list[str]]:
    """What each takes, by the columns of PRICE."""
    return [
        [
            row.label,
            plain(row.seconds),
            "-" if row.peak_bytes is None else size(row.peak_bytes),
            size(row.state_bytes),
            size(row.published_bytes),
            ", ".join(f"{need}.safetensors" for need in row.needs) or "-",
            "free" if row.order_independent else "matters",
        ]
        for row in found.rows
    ]


def conclusion(found: Results) -> list[str]:
    """What is recommended, the rule and the reason; or why nothing is."""
    if found.choice is None:
        return [
            "Nothing is recommended: no figure is known of every method. Let the evaluator score the same tasks always."
        ]
    missing = (
        []
        if found.figure == ACC
        else [f"ACC is not known, as no expert names its task in expert.json: methods are compared by {found.figure}."]
    )
    choice = found.choice
    return [f"Recommended: {choice.command}", *missing, choice.why, f"The rule: {choice.rule}."]


def section(found: Results) -> Section:
    """The beginning of the report."""
    tables = []
    if choice := found.choice:
        tables.append(Table("Recommended", ["command", "by the rule"], [[choice.command, choice.rule]], words=True))
    tables += [Table("How good they are", MERIT, merit(found)), Table("What they take", PRICE, price(found))]
    if found.left_out:
        gone = [[one.label, one.why, one.hint] for one in found.left_out]
        tables.append(Table("Left out", ["method", "why", "what to do"], gone, words=True))
    orders = [[str(place), ", ".join(order)] for place, order in enumerate(found.plan.orders, start=1)]
    tables.append(Table("The orders; the rest of this page is of the first", ["order", "experts"], orders, words=True))
    lead = " ".join(conclusion(found)[1:-1] if found.choice else conclusion(found))
    return Section("study", "The study", lead, "", _charts(found), tables, TERMS)


def _charts(found: Results) -> list[Chart]:
    """The mean score after each arrival, over the orders, of the methods that end best."""
    best = sorted(found.rows, key=lambda row: _last(row), reverse=found.higher_is_better)[:MOST_LINES]
    series = [Line(row.label, range(1, len(points) + 1), points) for row in best if (points := _curve(row))]
    if not series:
        return []
    caption = "The mean score after each arrival, over the orders, of the tasks that are not held out"
    about = f"How {len(series)} methods went; the table has the points."
    svg = charts.lines("study-curves", caption, about, series, "version", "mean score")
    cells = [[line.name, *(number(value) for value in line.ys)] for line in series]
    return [Chart(caption, Markup(svg), Table(caption, ["method", *map(str, series[0].xs)], cells))]


def _last(row: Row) -> float:
    return row.held_in.mean if row.held_in else float("-inf")


def _curve(row: Row) -> Sequence[float | None]:
    """By arrival, the mean over the orders; nothing where one was not scored."""
    points = [[accumulation(one.scores) for one in run.arrivals if one.number] for run in row.runs]
    means: list[float | None] = []
    for at in zip(*points, strict=True):
        known = [value for value in at if value is not None]
        means.append(sum(known) / len(known) if len(known) == len(at) else None)
    return means if any(value is not None for value in means) else []


def report(found: Results, overlap: Overlap | None) -> Report:
    """The first order's report, with what is known of all orders."""
    by = found.figure or ACC
    orders = {f"{row.label}: {by}": spread for row in found.rows if (spread := row.figure(by))}
    return replace(found.report, overlap=overlap, orders=orders)
