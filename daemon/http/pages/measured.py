"""What is drawn over the versions: norms, lambda, overlap, seconds, scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from daemon.http.pages.charts import Chart, Series, chart, outliers
from daemon.http.pages.lineage import measures
from daemon.notation import called
from projector.text import plain, shown
from registry.reader import Reader
from registry.records import Expert, Head, RelativeTo, Version

POINTS = 60  # versions
ROWS = 20  # of the table
TASKS = 6  # lines of scores
HEADS = 6  # lines of lambda and of seconds
SLOW = 4.0  # a merge that took so many times what is usual stands out


@dataclass(frozen=True, slots=True)
class Measured:
    """The charts, and the numbers of the newest versions of one head, for who does not see them."""

    head: Head
    charts: Sequence[Chart]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def measured(reader: Reader, heads: Sequence[Head]) -> Measured:
    """Of the newest POINTS versions; norms and scores are those of the first head."""
    first = heads[0]
    steps = {head.name: measures(reader, head, POINTS) for head in heads[:HEADS]}
    mine = steps[first.name]
    norms = [(one.number, expert.norm if expert else None) for one, expert in mine]
    odd = frozenset(one.number for one, expert in mine if expert and expert.flags)
    lambdas = {name: [(one.number, one.figures.get("lambda")) for one, _ in found] for name, found in steps.items()}
    overlaps = {head.name: overlap(head, steps[head.name]) for head in heads[:HEADS] if head.method == "opcm"}
    seconds = {name: [(one.number, one.seconds) for one, _ in found] for name, found in steps.items()}
    slow = outliers(seconds[first.name], SLOW)
    scores = _scores(reader, [one for one, _ in mine])
    made = [
        chart(
            "norms",
            "How far each expert is from the base",
            "The norm of each expert's task vector. A ring: it was flagged as odd.",
            [Series("norm", norms, odd)],
        ),
        chart(
            "lambda",
            "By what the sum is shortened",
            "Lambda: what opcm has summed up is divided by it.",
            [Series(name, points) for name, points in lambdas.items()],
        ),
        chart(
            "overlap",
            "How much of each expert was there already",
            "The share of an expert's task vector, squared, that opcm left out, as others had it.",
            [Series(name, points) for name, points in overlaps.items()],
        ),
        chart(
            "seconds",
            "Seconds of each arrival",
            "How long each merge took, by head. A ring: much longer than usual.",
            [Series(name, points, slow if name == first.name else frozenset()) for name, points in seconds.items()],
        ),
        chart(
            "scores",
            f"Scores of {first.name}",
            "What the evaluator said, by task.",
            [Series(shown(task)[:40], points) for task, points in list(scores.items())[:TASKS]],
            zero=False,
        ),
    ]
    tasks = list(scores)[:TASKS]
    by_task = {task: dict(scores[task]) for task in tasks}
    reported = {"lambda": dict(lambdas[first.name]), "overlap": dict(overlaps.get(first.name, ()))}
    of_method = {name: found for name, found in reported.items() if any(value is not None for value in found.values())}
    rows = [
        [
            called(first.name, one.number),
            _number(expert.norm if expert else None),
            *(_number(found.get(one.number)) for found in of_method.values()),
            _number(one.seconds),
            *(_number(by_task[task].get(one.number)) for task in tasks),
        ]
        for one, expert in mine[::-1][:ROWS]
    ]
    columns = ["version", "norm", *of_method, "seconds", *(shown(task)[:40] for task in tasks)]
    return Measured(first, [one for one in made if one], columns, rows)


def overlap(head: Head, steps: Sequence[tuple[Version, Expert | None]]) -> list[tuple[int, float | None]]:
    """Which share of each expert's task vector, squared, opcm left out: what is added is orthogonal to what is there,
    so that the squares of the lengths add up.
    """
    found: list[tuple[int, float | None]] = []
    for (before, _), (one, expert) in pairwise(steps):
        old, new = before.figures.get("merged_norm"), one.figures.get("merged_norm")
        known = expert and expert.norm and old is not None and new is not None and one.parent == before.number
        if not known or head.relative_to is not RelativeTo.BASE:
            found.append((one.number, None))
            continue
        assert expert and expert.norm and old is not None and new is not None
        found.append((one.number, min(1.0, max(0.0, 1 - (new**2 - old**2) / expert.norm**2))))
    return found


def _scores(reader: Reader, versions: Sequence[Version]) -> dict[str, list[tuple[int, float | None]]]:
    said = reader.evaluations(one.evaluation for one in versions)
    scored = [(one.number, said[one.evaluation].scores) for one in versions if one.evaluation in said]
    tasks = list(scored[-1][1]) if scored else []
    return {task: [(n, scores[task].score if task in scores else None) for n, scores in scored] for task in tasks}


def _number(value: float | None) -> str:
    return "-" if value is None else plain(value)
