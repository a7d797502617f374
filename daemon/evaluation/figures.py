"""The field's figures, from scores alone: pure functions over what one head's versions scored.

a(t, i) below is the score of version t in task i; T is the newest version that was scored; e(i) is what the expert of
task i scores by itself. docs/evaluation.md has the formulas with their sources.

Two rules keep the figures honest. A difference is turned round where lower is better, so that more is always better. A
mean takes scores of one direction only, those where higher is better if there are any: a perplexity and an accuracy
have no mean. Which tasks were left out is said in `Field.left_out`; a share (`normalised`) has no unit, and takes all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean, stdev

from registry.records import Score, Scores


@dataclass(frozen=True, slots=True)
class Step:
    """One version of a head: its scores, none where it was not scored, and the task that its expert was trained for."""

    number: int
    scores: Scores = field(default_factory=dict)
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over several orders of arrival. stdev: of a sample; None for a single order."""

    orders: int
    mean: float
    stdev: float | None
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Field:
    """What the field reports of a head at version `number`. None: nothing there to work it out from.

    left_out: tasks that no mean takes, as their scores go the other way. learned: tasks that an expert was trained for.
    """

    number: int
    higher_is_better: bool
    left_out: Sequence[str]
    learned: Sequence[str]
    acc: float | None
    bwt: float | None
    bwt_tasks: int
    accumulation: float | None
    retention: float | None
    balance: float | None
    held_in_gain: float | None
    held_out_gain: float | None
    forgetting: Mapping[str, float]
    normalised: Mapping[str, float]
    mean_normalised: float | None


def better(after: Score, before: Score) -> float:
    """How much better the first is, in the task's own units: positive is better, whichever way the scores go.

    >>> better(Score(0.8), Score(0.5)) > 0, better(Score(9.0, False), Score(7.0, False))
    (True, -2.0)
    """
    difference = after.score - before.score
    return difference if after.higher_is_better else -difference


def comparable(scores: Scores) -> list[str]:
    """The tasks whose scores may stand in one mean: where higher is better, or all where that holds of none.

    >>> comparable({"qa": Score(0.8), "news": Score(21.0, higher_is_better=False)})
    ['qa']
    """
    return [task for task, score in scores.items() if score.higher_is_better] or list(scores)


def held_in(scores: Scores) -> list[str]:
    """The tasks that the mean of a model is over, here and in the gate: those that are not held out."""
    return [task for task, score in scores.items() if not score.held_out]


def accumulated(scores: Scores) -> list[str]:
    """Of these, the tasks whose scores may stand in one mean."""
    counted = comparable(scores)
    return [task for task in held_in(scores) if task in counted]


def mean(scores: Scores, tasks: Iterable[str]) -> float | None:
    """The mean score of these tasks; None where there is none, or one of them was not scored: the mean of other tasks
    would be another figure.
    """
    wanted = list(tasks)
    return fmean(scores[task].score for task in wanted) if wanted and all(task in scores for task in wanted) else None


def learned(steps: Sequence[Step]) -> dict[str, int]:
    """By task, the place in `steps` where an expert for it last arrived."""
    return {step.task: place for place, step in enumerate(steps) if step.task is not None}


def average_accuracy(steps: Sequence[Step]) -> float | None:
    """ACC = 1/T sum_i a(T, i), over the tasks that were learned and are scored.

    Lopez-Paz & Ranzato 2017 (GEM, arXiv 1706.08840, eq. 2), which OPCM (arXiv 2501.09522) reports.
    """
    last = steps[-1].scores
    return mean(last, [task for task in comparable(last) if task in learned(steps)])


def backward_transfer(steps: Sequence[Step]) -> dict[str, float]:
    """By task, a(T, i) - a(i, i): what came of it after its own expert had arrived. BWT is their mean,

    BWT = 1/(T-1) sum_{i<T} a(T, i) - a(i, i): GEM, eq. 3, the definition that OPCM reports.
    Without the task of the last arrival, and without those whose arrival was not scored.
    """
    last, arrivals = steps[-1].scores, learned(steps)
    return {
        task: better(last[task], steps[place].scores[task])
        for task, place in arrivals.items()
        if place < len(steps) - 1 and task in last and task in steps[place].scores
    }


def forgetting(steps: Sequence[Step]) -> dict[str, float]:
    """By task, max_{0<t<T} a(t, i) - a(T, i): what was lost of the best that a merged model ever had. Negative where
    the newest is the best.

    Chaudhry et al. 2018 (arXiv 1801.10112, eq. 3). Version 0, the base, is no merged model.
    """
    last = steps[-1].scores
    earlier = [step.scores for step in steps[:-1] if step.number > 0]
    return {
        task: max(better(scores[task], now) for scores in earlier if task in scores)
        for task, now in last.items()
        if any(task in scores for scores in earlier)
    }


def accumulation(scores: Scores) -> float | None:
    """Knowledge accumulation: the mean of the tasks that are not held out, whether their experts arrived yet or not.

    TIME (arXiv 2412.06712).
    """
    return mean(scores, accumulated(scores))


def retention(scores: Scores) -> float | None:
    """Zero-shot retention: the mean of the tasks that are held out. TIME (arXiv 2412.06712)."""
    return mean(scores, [task for task in comparable(scores) if scores[task].held_out])


def geometric_mean(a: float | None, b: float | None) -> float | None:
    """sqrt(a b), by which TIME ranks; None where one is not known, or below zero."""
    return None if a is None or b is None or min(a, b) < 0 else sqrt(a * b)


def normalised(scores: Scores, own: Scores) -> dict[str, float]:
    """By task, a(T, i) / e(i), the share of its expert's own score: e(i) / a(T, i) where lower is better. 1: as good.

    Ilharco et al. 2023 (arXiv 2212.04089). Without tasks with a score that is not positive, which has no share.
    """
    return {
        task: scores[task].score / alone.score if alone.higher_is_better else alone.score / scores[task].score
        for task, alone in own.items()
        if task in scores and min(scores[task].score, alone.score) > 0
    }


def gain(scores: Scores, base: Scores, held_out: bool) -> float | None:
    """The mean of what is won over the base, over the tasks that are held out, or that are not: held-in against
    held-out, arXiv 2409.18314.
    """
    won = [
        better(scores[task], base[task])
        for task in comparable(scores)
        if task in base and scores[task].held_out is held_out
    ]
    return fmean(won) if won else None


def order_spread(finals: Sequence[float]) -> Spread:
    """One figure, such as ACC, over several orders of the same experts; OPCM reports mean and standard deviation of
    ten.

    >>> order_spread([0.7, 0.8]).mean
    0.75
    """
    return Spread(
        len(finals), fmean(finals), stdev(finals) if len(finals) > 1 else None, least=min(finals), most=max(finals)
    )


def figures(steps: Sequence[Step], own: Scores, base: Scores) -> Field | None:
    """All of them for one head. steps: its versions, oldest first. own: by task, what its expert scores by itself.

    None where no version was scored; what came after the newest one that was is not looked at.
    """
    scored = [place for place, step in enumerate(steps) if step.scores]
    if not scored:
        return None
    steps = steps[: scored[-1] + 1]
    last = steps[-1].scores
    counted = comparable(last)
    moved = [change for task, change in backward_transfer(steps).items() if task in counted]
    shares = normalised(last, own)
    accumulated, retained = accumulation(last), retention(last)
    return Field(
        number=steps[-1].number,
        higher_is_better=last[counted[0]].higher_is_better,
        left_out=[task for task in last if task not in counted],
        learned=list(learned(steps)),
        acc=average_accuracy(steps),
        bwt=fmean(moved) if moved else None,
        bwt_tasks=len(moved),
        accumulation=accumulated,
        retention=retained,
        balance=geometric_mean(accumulated, retained),
        held_in_gain=gain(last, base, held_out=False),
        held_out_gain=gain(last, base, held_out=True),
        forgetting=forgetting(steps),
        normalised=shares,
        mean_normalised=fmean(shares.values()) if shares else None,
    )
