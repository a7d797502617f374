"""What the rules of `[evaluate] require` make of scores."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from daemon.requirements import Reference, Rule
from registry.records import Scores

Outcome = Literal["live", "held", "rejected"]


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

    def described(self) -> dict[str, Any]:
        """Ready for JSON: {"outcome", "broken": [{"rule", "outcome", "why"}], "notes"}."""
        raise NotImplementedError


def needs(rules: Collection[Rule]) -> set[Reference]:
    """Whose scores these rules ask for, beside the version's own."""
    return {rule.reference for rule in rules if not isinstance(rule.reference, float)}


def judge(rules: Sequence[Rule], question: Question) -> Verdict:
    """The verdict. The worst outcome of all broken rules counts: rejected, held, live.

    Raises NoScores where the evaluator left out what a rule needs: a task that the reference has, one that a rule
    names, a standard error.
    """
    raise NotImplementedError
