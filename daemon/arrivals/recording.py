"""A drop as the registry is told of it, before it is known what becomes of it and once it is refused."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from daemon.arrivals.inbox import Drop
from daemon.checkpoints.hints import filled, in_a_shell
from daemon.config import taking_effect
from daemon.errors import DaemonError, NotYet, Reason
from daemon.layout import Home, number
from projector.errors import ProjectorError
from projector.errors import Reason as ProjectorReason
from projector.text import NEW, shown
from registry.records import UNKNOWN_KIND, Expert, NewExpert, Status

ANEW = {
    *(Reason.PICKLE, Reason.LFS_POINTER, Reason.NOT_A_FILE, Reason.EQUALS_BASE, Reason.SCORES),
    *(ProjectorReason.TRUNCATED, ProjectorReason.BAD_HEADER, ProjectorReason.UNSUPPORTED_DTYPE),
    ProjectorReason.NOT_FINITE,
}
"""What nobody mends where it lies: another file takes its place."""


def arrived(drop: Drop, status: Status) -> NewExpert:
    """What is known of a drop from outside."""
    received = datetime.now(UTC) - timedelta(seconds=drop.waited_seconds)
    return NewExpert(shown(drop.name), UNKNOWN_KIND, None, drop.size_bytes, status, received, drop.entry)


def refused(
    expert: NewExpert, error: DaemonError | ProjectorError, expert_id: int, drop: Drop, home: Home
) -> NewExpert:
    """The expert as one that was refused, and why. expert_id: the one that it will have."""
    kept = home.quarantine(expert_id) / drop.name
    # not mv, which leaves the case open
    where = f" --home {in_a_shell(home.root)}"
    back = f"`mainstem quarantine retry {expert_id}{where}`"
    hint = filled(error.hint, kept, home)
    if error.reason is not Reason.SCORES:  # whose hint is whole
        hint = taking_effect(hint, back, where)
    if error.reason not in ANEW and not hint.endswith(back) and NEW not in error.hint:
        hint += f"; what is mended in quarantine/{number(expert_id)}/ goes back with {back}"
    return replace(expert, status=Status.QUARANTINED, reason=str(error.reason), detail=str(error), hint=hint)


def once_blocked(expert: NewExpert, blocked: Expert) -> NewExpert:
    """The expert as one that was here before, and may not come back."""
    detail, hint = why_blocked(blocked)
    return replace(expert, status=Status.DUPLICATE, duplicate_of=blocked.id, detail=detail, hint=hint)


def why_blocked(blocked: Expert) -> tuple[str, str]:
    """Why what is the same as this expert may not come back, and what to do where it should."""
    which = f"expert {blocked.id} ({blocked.name})"
    what = "taken out of the merge" if blocked.status is Status.WITHDRAWN else "rejected, or blocked"
    return (
        f"the same as {which}, which was {what}: it does not come back",
        f"where it is wanted after all, `mainstem unblock {blocked.id}`, then drop it again",
    )


def left_behind(expert: Expert) -> NewExpert:
    """An expert of another home, as one that may not come into a home that is made of that one."""
    what = {Status.WITHDRAWN: "taken out of the merge", Status.MERGED: "left out"}.get(expert.status, "blocked")
    return replace(
        expert,
        status=Status.DUPLICATE,
        duplicate_of=None,
        reason=None,
        detail=f"expert {expert.id} of the home that this one was made of was {what}: it does not come back",
        hint=f"where it is wanted after all, `mainstem unblock {expert.sha256}`, then drop it",
        flags=(),
        trained_head=None,
        trained_version=None,
        verdict=None,
    )


def changed(drop: Drop) -> NotYet:
    """What to raise where a drop changed under the reader's hands: it is tried again."""
    return NotYet(Reason.CHANGED, f"{shown(drop.name)} changed while it was read", "leave it alone until merged")
