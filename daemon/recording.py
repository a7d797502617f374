"""A drop as the registry is told of it, before it is known what becomes of it and once it is refused."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from daemon.config import taking_effect
from daemon.errors import DaemonError, NotYet, Reason
from daemon.hints import filled
from daemon.home import Home, number
from daemon.inbox import Drop
from projector.errors import ProjectorError
from projector.text import shown
from registry.records import UNKNOWN_KIND, NewExpert, Status


def arrived(drop: Drop, status: Status) -> NewExpert:
    """What is known of a drop from outside."""
    received = datetime.now(UTC) - timedelta(seconds=drop.waited_seconds)
    return NewExpert(shown(drop.name), UNKNOWN_KIND, None, drop.size_bytes, status, received, drop.entry)


def refused(
    expert: NewExpert, error: DaemonError | ProjectorError, expert_id: int, drop: Drop, home: Home
) -> NewExpert:
    """The expert as one that was refused, and why. expert_id: the one that it will have."""
    hint = filled(error.hint, home.quarantine(expert_id) / drop.name, home)
    hint = taking_effect(hint, f"move the expert from quarantine/{number(expert_id)}/ back into inbox/")
    return replace(expert, status=Status.QUARANTINED, reason=str(error.reason), detail=str(error), hint=hint)


def changed(drop: Drop) -> NotYet:
    """What to raise where a drop changed under the reader's hands: it is tried again."""
    return NotYet(Reason.CHANGED, f"{shown(drop.name)} changed while it was read", "leave it alone until merged")
