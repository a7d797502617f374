"""Whether anything goes on: told once it has not for a while, and once more when it does again.

Nothing goes on while merging waits for what it cannot do without (the disk, the registry, the inbox), and while the
expert in hand gets no further. A daemon with nothing to do, or that was told to pause, is not stalled; nor is one whose
evaluator runs, which has a time of its own.
"""

from daemon.home.condition import WAITING, Condition
from daemon.home.presence import Doing
from registry.records import Event, Happening

NO_PROGRESS = "no_progress"


class Stalling:
    """Looks at what is going on, now and then."""

    def __init__(self) -> None:
        self._mark: tuple[object, ...] | None = None  # what it hangs on
        self._since = 0.0
        self._told: str | None = None

    def look(self, found: Condition, now: float, stalled_seconds: float) -> Happening | None:
        """What is to be told now, if anything. now: by a monotonic clock, in seconds."""
        mark = _mark(found)
        if mark != self._mark:
            before, self._mark, self._since = self._mark, mark, now
            moved = mark is None or (before is not None and before[:2] == mark[:2])  # idle, or further with the same
            if self._told and moved:
                self._told, reason = None, self._told
                return Happening(Event.RECOVERED, {"reason": reason, "text": found.text, "expert": found.expert})
        if mark is None or self._told or now - self._since < stalled_seconds:
            return None
        self._told = str(mark[0])
        seconds = round(now - self._since)
        return Happening(
            Event.STALLED,
            {"reason": self._told, "text": found.text, "expert": found.expert, "seconds": seconds},
        )


def _mark(found: Condition) -> tuple[object, ...] | None:
    """What it hangs on, where it may: the word for it, what is meant, and how far that is; None where nothing hangs."""
    if found.doing == WAITING:
        reason = next((one.reason for one in found.troubles if one.text == found.text), WAITING)
        return reason, None
    working = found.expert and found.doing != Doing.EVALUATING
    return (NO_PROGRESS, found.expert, found.share) if working else None
