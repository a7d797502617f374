"""The sections that are about merging: norms, the overlap of the experts, seconds and bytes."""

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from daemon.notation import called
from daemon.reports.report import charts
from daemon.reports.report.charts import Cells, Line
from daemon.reports.report.gathering import Arrival, Report
from daemon.reports.report.parts import POINTS, Chart, Section, Table, newest, number, picked
from projector.text import listed, shown, size


def vectors(report: Report) -> Section:
    """How long the task vectors are, and the lambda of heads that have one, OPCM's."""
    title = "Norms"
    first = report.heads[0]
    arrived = [arrival for arrival in first.arrivals if arrival.norm is not None]
    if not arrived:
        return Section("vectors", title, missing="Nothing was merged yet: there are no task vectors.")
    norms = picked(arrived, POINTS)
    series = [Line("expert", [a.number for a in norms], [a.norm for a in norms])]
    kept = {head.name: picked(head.arrivals, POINTS) for head in report.heads}
    for name, arrivals in kept.items():
        series += _figure_line(f"{name} summed up", arrivals, "merged_norm")
    rows = [[called(first.name, a.number), number(a.norm), ", ".join(a.flags), a.expert or ""] for a in norms]
    about = (
        "The norm of each expert's task vector, and of what an opcm head has summed up, by version; the table has the"
        " experts'."
    )
    table = Table("Norms of the experts", ["version", "norm", "flags", "expert"], newest(rows))
    svg = charts.lines("norms", "Norms of task vectors", about, series, "version", "norm")
    found = [Chart("Norms of task vectors", Markup(svg), table)]
    lambdas = [line for name, arrivals in kept.items() for line in _figure_line(name, arrivals, "lambda")]
    if lambdas:
        title = "Norms and lambda"
        about = "The lambda by which OPCM divides what it has summed up, by version; the table has the values."
        svg = charts.lines("lambda", "Lambda", about, lambdas, "version", "lambda")
        rows = [
            [called(line.name, int(x)), number(y)] for line in lambdas for x, y in zip(line.xs, line.ys, strict=True)
        ]
        found.append(Chart("Lambda", Markup(svg), Table("Lambda", ["version", "lambda"], newest(rows))))
    lead = "A task vector is a model less the base; an expert whose norm stands out is worth a look."
    return Section("vectors", title, lead, charts=found)


def _figure_line(name: str, arrivals: Sequence[Arrival], key: str) -> Iterator[Line]:
    there = [arrival for arrival in arrivals if key in arrival.figures]
    if there:
        yield Line(name, [arrival.number for arrival in there], [arrival.figures[key] for arrival in there])


def overlap(report: Report) -> Section:
    """How far the experts pull the same way."""
    title = "Overlap of the experts"
    found = report.overlap
    if found and found.failed:
        missing = f"The experts could not be compared: {found.failed}. `mainstem verify` says what is damaged."
        return Section("overlap", title, missing=missing)
    if found is None or len(found.experts) < 2:
        missing = "It takes two merged experts that can be read in archive/, and --overlap 2 or more."
        return Section("overlap", title, missing=missing)
    k = len(found.experts)
    apart = [abs(c) for i, row in enumerate(found.cosines) for j, c in enumerate(row) if i != j and c is not None]
    strongest = max(apart, default=0.0) or 1.0
    cells = Cells(
        found.experts,
        [str(n) for n in range(1, k + 1)],
        [["" if i == j else _cosine(c) for j, c in enumerate(row)] for i, row in enumerate(found.cosines)],
        [
            [None if i == j or c is None else -c / strongest for j, c in enumerate(row)]
            for i, row in enumerate(found.cosines)
        ],
    )
    numbered = Cells(
        [f"{n} {shown(name)}" for n, name in enumerate(found.experts, start=1)],
        cells.columns,
        cells.texts,
        cells.shades,
    )
    of = "of all values" if found.share >= 1 else f"of {100 * found.share:.2g} % of the values, the same of each"
    caption = f"Cosines between the task vectors of the newest {k} experts, {of}"
    about = f"The cosine of each pair of {listed(found.experts)}; the table has them. The largest is {strongest:.3g}."
    svg = charts.heat_map("overlap", caption, about, numbered)
    table = Table(
        caption, ["expert", *cells.columns], [[name, *t] for name, t in zip(numbered.rows, cells.texts, strict=True)]
    )
    lead = (
        "Red: both pull the same way, and count twice in a sum; teal: they pull against each other. "
        f"Near zero they do not meet. The strongest colour is {strongest:.2g}."
    )
    missing = f"Left out, as they could not be read in archive/: {listed(found.left_out)}." if found.left_out else ""
    return Section("overlap", title, lead, missing, [Chart(caption, Markup(svg), table, columns=k)])


def costs(report: Report) -> Section:
    """What each arrival took."""
    title = "Seconds and bytes of each arrival"
    timed, sizes, rows = [], [], []
    for head in report.heads:
        arrivals = picked([a for a in head.arrivals if a.number and a.seconds is not None], POINTS)
        if arrivals:
            timed.append(Line(head.name, [a.number for a in arrivals], [a.seconds for a in arrivals]))
            sizes.append(
                Line(f"{head.name} published", [a.number for a in arrivals], [a.published_bytes for a in arrivals])
            )
            rows += [
                [called(head.name, a.number), f"{a.seconds:.3g}", _bytes(a.expert_bytes), _bytes(a.published_bytes)]
                for a in arrivals
            ]
    if not timed:
        return Section("costs", title, missing="Nothing was merged yet, or by a version that did not take the time.")
    arrived = picked([a for a in report.heads[0].arrivals if a.expert_bytes is not None], POINTS)
    sizes.insert(0, Line("expert", [a.number for a in arrived], [a.expert_bytes for a in arrived]))
    largest = max(value for line in sizes for value in line.ys if value is not None)
    unit, factor = next(
        (u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)) if largest >= f or f == 1
    )
    scaled = [Line(s.name, s.xs, [None if y is None else y / factor for y in s.ys]) for s in sizes]
    table = Table(title, ["version", "seconds", "expert", "published"], newest(rows))
    seconds = charts.lines(
        "seconds", "Seconds", "Seconds by version; the table has them.", timed, "version", "seconds", zero=True
    )
    nbytes = charts.lines("bytes", "Bytes", "Bytes by version; the table has them.", scaled, "version", unit, zero=True)
    return Section(
        "costs",
        title,
        charts=[Chart("Seconds", Markup(seconds), table), Chart("Bytes read and published", Markup(nbytes), table)],
    )


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".replace("0.", ".", 1)


def _bytes(value: int | None) -> str:
    return "-" if value is None else size(value)
