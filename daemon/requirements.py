"""The language of `[evaluate] require`: what a version's scores must keep to, so that it goes live.

    SUBJECT >= REFERENCE [+|- AMOUNT] [else hold|reject]

Better is always ">=": where lower is better for a task, its comparison is turned round. What judges by it is
daemon/evaluation/rules.py; this stands apart, so that the settings can be checked when they are read.
"""

import re
from dataclasses import dataclass
from math import isfinite
from typing import Literal, NoReturn, cast, get_args

from projector.text import plain, shown

Subject = Literal["each", "mean", "own", "task"]
Reference = Literal["live", "base", "expert"]
Otherwise = Literal["hold", "reject"]

GRAMMAR = (
    "SUBJECT >= REFERENCE [+|- AMOUNT] [else hold|reject], where SUBJECT is each, mean, own or a task in double quotes,"
    " REFERENCE is live, base, expert or a number, and AMOUNT is a number or, as 2 se, so many standard errors; as in"
    " `each >= live - 0.02 else reject`"
)
MOST_LETTERS = 400

_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"

WHOSE = {"live": "the live version", "base": "the base", "expert": "the expert by itself"}
_OTHERWISE = {"hold": "else the version is held", "reject": "else the expert is rejected"}


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
        """What it asks, and what follows where it is broken.

        >>> parse("each >= live - 0.02").meaning()
        'no task may lose more than 0.02 against the live version; else the version is held'
        >>> parse('"sort" >= 0.7 else reject').meaning()
        'the task "sort" must score 0.7 or better; else the expert is rejected'
        """
        return f"{self._who()} {self._what()}; {_OTHERWISE[self.otherwise]}"

    def _who(self) -> str:
        if self.subject == "each":
            return "no task" if self._forbids() else "every task"
        if self.subject == "mean":
            return "the mean of the tasks that are not held out"
        return "the expert's own task" if self.subject == "own" else f'the task "{shown(self.task or "")}"'

    def _forbids(self) -> bool:
        """True for what is worded as what must not be."""
        return not isinstance(self.reference, float) and self.amount <= 0

    def _what(self) -> str:
        amount = how_much(abs(self.amount), self.in_errors)
        if isinstance(self.reference, float):
            sign = "less" if self.amount < 0 else "plus"
            value = f"{plain(self.reference, digits=6)}{f' {sign} {amount}' if self.amount else ''}"
            return f"must score {value} or better"
        whose = WHOSE[self.reference]
        if self.amount > 0:
            return f"must gain at least {amount} against {whose}"
        may = "may" if self.subject == "each" else "may not"
        return f"{may} lose more than {amount} against {whose}" if self.amount else f"{may} be worse than {whose}"


def how_much(amount: float, in_errors: bool) -> str:
    """An amount in words."""
    number = plain(amount, digits=6)
    return f"{number} standard error{'' if amount == 1 else 's'}" if in_errors else number


def parse(text: str) -> Rule:
    """The rule that is written so. Raises ValueError, which says what is wrong, where, and shows the grammar."""
    if len(text) > MOST_LETTERS or not text.isprintable():
        raise ValueError(f"the rule `{shown(text)}` is no printable line of at most {MOST_LETTERS} letters")
    rest = _Rest(text)
    subject = rest.take(r'each\b|mean\b|own\b|"[^"]+"', "each, mean, own or a task in double quotes")
    rest.take(">=", "`>=`")
    reference = rest.take(rf"(?:live|base|expert)\b|[+-]?{_NUMBER}(?![\w.])", "live, base, expert or a number")
    sign = rest.try_taking("[+-]")
    amount = float(rest.take(rf"{_NUMBER}(?![\d.])", "a number")) if sign else 0.0
    in_errors = bool(sign and rest.try_taking(r"se\b"))
    otherwise = rest.take(r"(?:hold|reject)\b", "hold or reject") if rest.try_taking(r"else\b") else "hold"
    rest.end("`else` or its end" if sign else "`+`, `-`, `else` or its end")
    number = reference not in get_args(Reference)
    if not isfinite(amount) or (number and not isfinite(float(reference))):
        raise ValueError(f"the rule `{shown(text)}` has a number that is too large")
    named = subject.startswith('"')
    return Rule(
        text=text.strip(),
        subject="task" if named else cast(Subject, subject),
        task=subject[1:-1] if named else None,
        reference=float(reference) if number else cast(Reference, reference),
        amount=-amount if sign == "-" else amount,
        in_errors=in_errors,
        otherwise=cast(Otherwise, otherwise),
    )


class _Rest:
    """What is left of a rule while it is read from the left."""

    def __init__(self, text: str) -> None:
        self._text, self._place = text, 0

    def try_taking(self, pattern: str) -> str:
        """The next word, where it is such a one; else nothing."""
        match = re.compile(rf"\s*({pattern})").match(self._text, self._place)
        if match is None:
            return ""
        self._place = match.end()
        return match[1]

    def take(self, pattern: str, wanted: str) -> str:
        """The next word, which must be such a one. Raises ValueError."""
        return self.try_taking(pattern) or self._refuse(wanted)

    def end(self, wanted: str) -> None:
        """Raises ValueError where anything is left."""
        if self._text[self._place :].strip():
            self._refuse(wanted)

    def _refuse(self, wanted: str) -> NoReturn:
        rest = self._text[self._place :].lstrip()
        found = f"at letter {len(self._text) - len(rest) + 1} stands `{shown(rest)}`" if rest else "it ends"
        raise ValueError(f"the rule `{shown(self._text)}`: {found}, where {wanted} should be; a rule is {GRAMMAR}")
