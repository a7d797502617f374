"""The language of `[evaluate] require`: what a version's scores must keep to go live.

    SUBJECT >= REFERENCE [+|- AMOUNT] [else hold|reject]

Better is always ">=": where lower is better for a task, its comparison is turned round. What judges by it is
daemon/evaluation/rules.py; this stands apart, so that the settings can be checked when they are read.
"""

from dataclasses import dataclass
from typing import Literal

Subject = Literal["each", "mean", "own", "task"]
Reference = Literal["live", "base", "expert"]
Otherwise = Literal["hold", "reject"]

GRAMMAR = (
    "SUBJECT >= REFERENCE [+|- AMOUNT] [else hold|reject], where SUBJECT is each, mean, own or a task in double quotes,"
    " REFERENCE is live, base, expert or a number, and AMOUNT is a number or, as 2 se, so many standard errors; as in"
    " `each >= live - 0.02 else reject`"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    task: its name, where the subject is a task. reference: whose score, or a number. amount: what is added to it, in
    the score's own units, or in standard errors (of the difference, where the reference is a score).
    """

    text: str
    subject: Subject
    task: str | None
    reference: Reference | float
    amount: float = 0.0
    in_errors: bool = False
    otherwise: Otherwise = "hold"

    def meaning(self) -> str:
        """In words: "no task may lose more than 0.02 against the live version; else the version is held"."""
        raise NotImplementedError


def parse(text: str) -> Rule:
    """The rule that is written so. Raises ValueError, which says what is wrong, where, and shows the grammar."""
    raise NotImplementedError
