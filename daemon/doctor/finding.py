"""One thing that was looked at. A module of its own, for every check says it so."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How it is: bad keeps mainstem from working, or data from being safe; warn may, one day."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """check: what was looked at, a stable word. text: what was found. hint: what to do; "" where that is nothing."""

    check: str
    level: Level
    text: str
    hint: str = ""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, text)


def warn(check: str, text: str, hint: str) -> Finding:
    """It may become a trouble."""
    return Finding(check, Level.WARN, text, hint)


def bad(check: str, text: str, hint: str) -> Finding:
    """It is one."""
    return Finding(check, Level.BAD, text, hint)
