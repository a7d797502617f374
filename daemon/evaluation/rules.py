"""What the rules of `[evaluate] require` make of scores. What they may say is in daemon/requirements.py.

A rule that is about nothing here (an expert that names no task, a reference that was never scored) does not apply, and
the verdict says so. What the evaluator left out is never passed over: that would let through what it did not measure.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot
from statistics import fmean
from typing import Any, Literal

from daemon.errors import NoScores
from daemon.evaluation.figures import accumulated, held_in
from daemon.requirements import WHOSE, Reference, Rule, how_much
from projector.text import listed, plain, shown
from registry.records import Score, Scores

Outcome = Literal["live", "held", "rejected"]
UNJUDGED = "unjudged"  # in place of an outcome, where nobody asked the rules

SLACK = 1e-9  # of the larger score: 0.8 is no less than 0.7 + 0.1, whatever rounding makes of it
DIGITS = 4
ALIKE = "score the same tasks each time; `mainstem evaluate --again` scores what is live anew"

Pairs = Mapping[str, tuple[Score, Score]]
"""A version's score and what it is held against, by task."""

_FOLLOWS: dict[str, Outcome] = {"hold": "held", "reject": "rejected"}
_WORST: tuple[Outcome, ...] = ("live", "held", "rejected")


@dataclass(frozen=True, slots=True)
class Question:
    """May a version go live? Its scores, and those that they are held against, where there are any.

    expert: of the newest expert by itself. own: the task that its expert.json names.
    """

    candidate: Scores
    live: Scores | None = None
    base: Scores | None = None
    expert: Scores | None = None
    own: str | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that was not kept: as it is written, what it leads to, and by which scores."""

    rule: str
    outcome: Outcome
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided, by which rules, and what else there is to say: which rules did not apply, and why."""

    outcome: Outcome
    broken: tuple[Broken, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def why(self) -> str | None:
        """Which rules were broken, and by what; None where all were kept."""
        return "; ".join(f"`{one.rule}`: {one.why}" for one in self.broken) or None

    def described(self) -> dict[str, Any]:
        """Ready for JSON: {"outcome", "broken": [{"rule", "outcome", "why"}], "notes"}."""
        broken = [{"rule": one.rule, "outcome": one.outcome, "why": one.why} for one in self.broken]
        return {"outcome": self.outcome, "broken": broken, "notes": list(self.notes)}


def unjudged(why: str) -> dict[str, Any]:
    """The verdict on a version that nobody judged, ready for JSON."""
    return {"outcome": UNJUDGED, "broken": [], "notes": [f"it was not judged: {why}"]}


class _Silent(Exception):
    """A rule does not apply, and why."""


def needs(rules: Collection[Rule]) -> set[Reference]:
    """Whose scores these rules ask for, beside the version's own."""
    return {rule.reference for rule in rules if not isinstance(rule.reference, float)}


def judge(rules: Sequence[Rule], question: Question) -> Verdict:
    """The verdict. The worst outcome of all broken rules counts: rejected, held, live.

    Raises NoScores where the evaluator left out what a rule needs: a task that the reference has, one that a rule
    names, a standard error.
    """
    broken: list[Broken] = []
    notes: list[str] = []
    for rule in rules:
        try:
            why = "; ".join(_complaints(rule, _pairs(rule, question)))
        except _Silent as silent:
            notes.append(f"`{rule.text}` does not apply: {silent}")
            continue
        if why:
            broken.append(Broken(rule.text, _FOLLOWS[rule.otherwise], why))
    outcomes: list[Outcome] = ["live", *(one.outcome for one in broken)]
    return Verdict(max(outcomes, key=_WORST.index), tuple(broken), tuple(notes))


def _pairs(rule: Rule, question: Question) -> Pairs:
    """What a rule compares, by task. Raises _Silent and NoScores."""
    candidate = question.candidate
    if rule.subject == "own" and question.own is None:
        raise _Silent("the expert names no task of its own")
    reference = _reference(rule, question)
    if rule.subject == "own" and question.own not in candidate:
        raise _Silent(f"the expert's task `{shown(str(question.own))}` is not scored")
    if rule.subject == "task" and rule.task not in candidate:
        raise NoScores(
            f"the evaluator gave no score for `{shown(str(rule.task))}`, which the rule `{rule.text}` names",
            f"call the task in evaluate.require as the evaluator does: {listed(candidate)}",
        )
    wanted = {"own": question.own, "task": rule.task}.get(rule.subject)
    pairs = {
        task: (score, reference[task])
        for task, score in candidate.items()
        if task in reference and wanted in (None, task)
    }
    if not pairs:
        raise _Silent(f"{_whose(rule)} has no score for what it is about")
    return pairs


def _reference(rule: Rule, question: Question) -> Scores:
    """What the candidate's scores are held against, by task. Raises _Silent where there is nothing, and NoScores where
    the two were not scored alike.
    """
    candidate = question.candidate
    if isinstance(rule.reference, float):
        return {task: replace(score, score=rule.reference, stderr=0.0) for task, score in candidate.items()}
    scores: Scores | None = getattr(question, rule.reference)
    if scores is None:
        raise _Silent(f"{_whose(rule)} has no scores")
    if missing := [task for task in scores if task not in candidate]:
        raise NoScores(f"the evaluator gave no score for {listed(missing)}, by which {_whose(rule)} was scored", ALIKE)
    for task, score in scores.items():
        if score.higher_is_better != candidate[task].higher_is_better:
            raise NoScores(f"the evaluator changed its mind about which scores of `{shown(task)}` are better", ALIKE)
    return scores


def _complaints(rule: Rule, pairs: Pairs) -> Iterator[str]:
    """What breaks a rule, in words: one for each task, or one for the mean. Raises _Silent and NoScores.

    A mean is over the tasks that are not held out. Against another's scores it is that of what each task gained, and
    against a number that of `figures.accumulation`, which takes the tasks of one direction only.
    """
    if rule.subject != "mean":
        for task, pair in pairs.items():
            yield from _complaint(rule, f"`{shown(task)}`", {task: pair})
        return
    mine = {task: pair[0] for task, pair in pairs.items()}
    counted = accumulated(mine) if isinstance(rule.reference, float) else held_in(mine)
    if not counted:
        raise _Silent("what it compares is held out, and in no mean")
    pairs = {task: pairs[task] for task in counted}
    yield from _complaint(rule, f"the mean of {len(pairs)} {'task' if len(pairs) == 1 else 'tasks'}", pairs)


def _complaint(rule: Rule, what: str, pairs: Pairs) -> Iterator[str]:
    """In words where the mean of these pairs breaks the rule, and nothing where it does not. Raises NoScores.

    gain: by how much it is better, in the score's own units; least: how much was asked for.
    """
    gain = fmean((one.score - other.score) * (1 if one.higher_is_better else -1) for one, other in pairs.values())
    least = rule.amount * (_standard_error(rule, pairs) if rule.in_errors else 1.0)
    largest = max(abs(score.score) for pair in pairs.values() for score in pair)
    if gain >= least - SLACK * max(largest, abs(least)):
        return
    directions = {one.higher_is_better for one, _ in pairs.values()}
    values = ""
    if len(directions) == 1:  # else they have no mean that says anything
        mine, other = (fmean(pair[place].score for pair in pairs.values()) for place in (0, 1))
        values = f" {_number(mine)} against {_number(other)}{'' if directions == {True} else ' (lower is better)'}"
    amount = how_much(abs(rule.amount), rule.in_errors) + (f" ({_number(abs(least))})" if rule.in_errors else "")
    asked = f"at least {amount} better" if least > 0 else f"at most {amount} worse" if least < 0 else "no worse"
    found = f"{_number(abs(gain))} {'better' if gain > 0 else 'worse'}" if gain else "no better"
    yield f"{what}{values}: {found} than {_whose(rule)}, asked is {asked}"


def _standard_error(rule: Rule, pairs: Pairs) -> float:
    """Of the mean difference of these pairs. Raises NoScores where a score came without its own."""
    errors = [score.stderr for pair in pairs.values() for score in pair]
    if None in errors:
        without = [task for task, pair in pairs.items() if None in (pair[0].stderr, pair[1].stderr)]
        raise NoScores(
            f"{listed(without)} came without a standard error, which the rule `{rule.text}` asks for",
            "print `stderr` with each score, or write the rule in the score's own units",
        )
    return hypot(*(error for error in errors if error)) / len(pairs)


def _whose(rule: Rule) -> str:
    return _number(rule.reference) if isinstance(rule.reference, float) else WHOSE[rule.reference]


def _number(value: float) -> str:
    return plain(value, DIGITS)
