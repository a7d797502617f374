"""The sections that are about scores: the field's figures, every task, the heads over time, the gate's verdicts."""

from collections import Counter
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from daemon.evaluation.figures import Field, accumulation, better, comparable, geometric_mean, retention
from daemon.notation import called
from daemon.reports.report import charts
from daemon.reports.report.charts import Cells, Line
from daemon.reports.report.gathering import Arrival, HeadReport, Report
from daemon.reports.report.parts import POINTS, Chart, Section, Table, newest, number, picked, scores, signed
from projector.text import listed
from registry.records import Score, Scores

COLUMNS = 16  # versions of a heat map
JUDGED = 50  # verdicts
FORGOTTEN = 12  # tasks

NO_SCORES = (
    'No version was scored: say in mainstem.toml how, with [evaluate] command, and run "mainstem evaluate --all".'
)
UNSCORED = "No version was scored."
TERMS = (
    ("ACC", "mean score of the tasks whose experts arrived"),
    ("BWT", "what became of a task after its own expert had arrived, on average; below zero is forgetting"),
    ("accumulation", "mean of the tasks that are not held out, whether their experts arrived or not"),
    ("retention", "mean of the held-out tasks: what the base could do, and no expert was trained for"),
    ("balance", "geometric mean of these two"),
    ("share of the experts", "score over that of the task's expert by itself, on average"),
    ("gain", "what was won over the base, on average: held in, and held out"),
)


def figures(report: Report) -> Section:
    """What the field reports of each head, at its newest version that was scored."""
    fields = [(head, head.found) for head in report.heads if head.found]
    if not fields:
        return Section("figures", "The field's figures", missing=NO_SCORES)
    columns = ["head", "version", "ACC", "BWT", "accumulation", "retention", "balance", "share of the experts"]
    rows = [_field_row(head, found) for head, found in fields]
    left_out = sorted({task for _, found in fields for task in found.left_out})
    unknown = [] if any(found.learned for _, found in fields) else ["no expert.json names a task: there is no ACC"]
    if left_out:
        unknown.append(f"no mean takes {listed(left_out)}: lower is better there")
    missing = "; ".join(unknown)
    tables = [Table("Figures of the newest version that was scored", [*columns, "gain held in", "gain held out"], rows)]
    lost = {
        task: max(found.forgetting.get(task, 0.0) for _, found in fields)
        for _, found in fields
        for task in found.forgetting
    }
    worst = sorted((task for task in lost if lost[task] > 0), key=lambda task: -lost[task])[:FORGOTTEN]
    if worst:
        tables.append(
            Table(
                "Forgotten: what a task has lost of the best that any version before had",
                ["task", *(head.name for head, _ in fields)],
                [[task, *(number(found.forgetting.get(task)) for _, found in fields)] for task in worst],
            )
        )
    if report.orders:
        orders = [
            [name, str(s.orders), number(s.mean), number(s.stdev), number(s.least), number(s.most)]
            for name, s in report.orders.items()
        ]
        tables.append(
            Table("Over several orders of arrival", ["figure", "orders", "mean", "deviation", "least", "most"], orders)
        )
    return Section("figures", "The field's figures", missing=_sentence(missing), tables=tables, terms=TERMS)


def _field_row(head: HeadReport, found: Field) -> list[str]:
    return [
        head.name,
        called(head.name, found.number),
        number(found.acc),
        signed(found.bwt),
        number(found.accumulation),
        number(found.retention),
        number(found.balance),
        number(found.mean_normalised),
        signed(found.held_in_gain),
        signed(found.held_out_gain),
    ]


def matrix(report: Report) -> Section:
    """A heat map of each head."""
    title = "Every task in every version"
    found = [_heat(place, head) for place, head in enumerate(report.heads) if _scored(head)]
    if not found:
        return Section("matrix", title, missing=UNSCORED)
    lead = (
        "A cell has the score; teal is better than the base, red is worse, and the stronger the further from it. "
        "Where the base was not scored, the first version stands for it."
    )
    return Section("matrix", title, lead, charts=found)


def _scored(head: HeadReport) -> list[Arrival]:
    return [arrival for arrival in head.versions if arrival.scores]


def _heat(place: int, head: HeadReport) -> Chart:
    shown_versions = picked(_scored(head), COLUMNS)
    last = shown_versions[-1].scores
    tasks = sorted(
        {task: None for arrival in shown_versions for task in arrival.scores},
        key=lambda task: (_any(shown_versions, task).held_out, not _any(shown_versions, task).higher_is_better),
    )
    origin = shown_versions[0].scores
    gains = {task: [_gain(arrival.scores.get(task), origin.get(task)) for arrival in shown_versions] for task in tasks}
    together = comparable(last)
    scale = {task: _largest(gains, together if task in together else [task]) for task in tasks}
    names = [str(arrival.number) for arrival in shown_versions]
    cells = Cells(
        rows=[_task_name(task, _any(shown_versions, task)) for task in tasks],
        columns=names,
        texts=[scores([_value(arrival.scores.get(task)) for arrival in shown_versions]) for task in tasks],
        shades=[[None if gain is None else gain / scale[task] for gain in gains[task]] for task in tasks],
    )
    many = len(_scored(head))
    which = f"{len(names)} of its {many:,} scored versions" if many > len(names) else "its scored versions"
    caption = f"{head.name}: {len(tasks)} tasks in {which}"
    about = f"The scores of {listed(tasks)} in versions {', '.join(names)} of {head.name}; the table has them."
    table = Table(
        caption, ["task", *names], [[row, *texts] for row, texts in zip(cells.rows, cells.texts, strict=True)]
    )
    return Chart(caption, Markup(charts.heat_map(f"heat{place}", caption, about, cells)), table, columns=len(names))


def _any(arrivals: Sequence[Arrival], task: str) -> Score:
    return next(arrival.scores[task] for arrival in reversed(arrivals) if task in arrival.scores)


def _task_name(task: str, score: Score) -> str:
    marks = "".join(
        mark for mark, there in ((" ↓", not score.higher_is_better), (" (held out)", score.held_out)) if there
    )
    return charts.short(task, charts.LONGEST_NAME - len(marks)) + marks


def _value(score: Score | None) -> float | None:
    return score.score if score else None


def _gain(score: Score | None, origin: Score | None) -> float | None:
    return None if score is None or origin is None else better(score, origin)


def _largest(gains: Mapping[str, Sequence[float | None]], tasks: Sequence[str]) -> float:
    known = [abs(gain) for task in tasks for gain in gains.get(task, ()) if gain is not None]
    return max(known, default=0.0) or 1.0


def over_time(report: Report) -> Section:
    """How each head went."""
    title = "Over time"
    if not any(_scored(head) for head in report.heads):
        return Section("time", title, missing=UNSCORED)
    found, missing = [_curves(report)], ""
    if balance := _balance(report):
        found.append(balance)
    else:
        missing = (
            'There is no retention, as no task is held out: let the evaluator say "held_out": true of those that no '
            "expert is trained for."
        )
    lead = "A cross is a version that was held. A gap in a line: other tasks were scored there than in the newest."
    return Section("time", title, lead, missing, found)


def _balance(report: Report) -> Chart | None:
    series, rows = [], []
    for head in report.heads:
        points = [
            (arrival.number, kept, learned)
            for arrival in picked(_scored(head), POINTS)
            if (kept := retention(arrival.scores)) is not None and (learned := accumulation(arrival.scores)) is not None
        ]
        if points:
            series.append(Line(head.name, [kept for _, kept, _ in points], [learned for _, _, learned in points]))
            rows += [
                [called(head.name, n), number(learned), number(kept), number(geometric_mean(learned, kept))]
                for n, kept, learned in points
            ]
    if not series:
        return None
    caption = "Accumulation against retention, from ring to full circle"
    about = f"How {listed([line.name for line in series])} went, version by version; the table has the points."
    svg = charts.path("balance", caption, about, series, "retention: mean of held-out tasks", "accumulation")
    return Chart(
        caption, Markup(svg), Table(caption, ["version", "accumulation", "retention", "balance"], newest(rows))
    )


def _curves(report: Report) -> Chart:
    series, rows = [], []
    for head in report.heads:
        if scored := picked([arrival for arrival in _scored(head) if head.whole or arrival.number], POINTS):
            counted = set(comparable(scored[-1].scores))
            means = [_mean_of(arrival.scores, counted) for arrival in scored]
            hollow = [place for place, arrival in enumerate(scored) if arrival.held]
            series.append(Line(head.name, [arrival.number for arrival in scored], means, hollow))
            rows += [
                [called(head.name, arrival.number), number(mean), arrival.expert or "", "held" if arrival.held else ""]
                for arrival, mean in zip(scored, means, strict=True)
            ]
    caption = "Each head's mean score, over the tasks that are not held out"
    about = f"The mean score of {listed([line.name for line in series])} by version; the table has the points."
    svg = charts.lines("curves", caption, about, series, "version", "mean score")
    return Chart(caption, Markup(svg), Table(caption, ["version", "mean score", "expert", ""], newest(rows)))


def _mean_of(scores: Scores, counted: set[str]) -> float | None:
    """Over the same tasks as the newest version's; None where one of them is missing."""
    return accumulation(scores) if counted == set(comparable(scores)) else None


def verdicts(report: Report) -> Section:
    """What the gate decided, newest first."""
    title = "Verdicts of the gate"
    judged = [(head.name, arrival) for head in report.heads for arrival in head.arrivals if _outcome(arrival)]
    judged.sort(key=lambda one: -one[1].number)
    if not judged and not report.rejected:
        missing = "No version was judged: say in mainstem.toml by what, with [evaluate] require."
        return Section("verdicts", title, missing=missing)
    counts = Counter(_outcome(arrival) for _, arrival in judged)
    counts["rejected"] += len(report.rejected)
    lead = f"{', '.join(f'{count} {outcome}' for outcome, count in counts.items() if count)}."
    rows = [[f"expert {one.expert_id}", "rejected", one.expert, one.why] for one in report.rejected]
    rows += [
        [called(name, arrival.number), _outcome(arrival), arrival.expert or "", _why(arrival)]
        for name, arrival in judged[:JUDGED]
    ]
    caption = f"Experts that were rejected, and the newest {JUDGED} versions that were judged"
    table = Table(caption, ["version", "outcome", "expert", "why"], rows, words=True)
    return Section("verdicts", title, lead, tables=[table])


def _outcome(arrival: Arrival) -> str:
    """ "live", "held", or nothing where nobody judged it."""
    decided = str(arrival.verdict.get("outcome", "")) if arrival.verdict else ""
    return "held" if arrival.held else decided


def _why(arrival: Arrival) -> str:
    """What its verdict says, as `Verdict.described` has it."""
    broken, notes = (arrival.verdict or {}).get("broken"), (arrival.verdict or {}).get("notes")
    said = [f"{one.get('rule')}: {one.get('why')}" for one in broken] if isinstance(broken, list) else []
    said += map(str, notes) if isinstance(notes, list) else ()
    return "; ".join(said) or arrival.held or "every rule was kept"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""
