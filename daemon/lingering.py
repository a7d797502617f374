"""What stays in the inbox for a while, and why: it is told once, and looked at again once something about it changes.

Held back or incomplete, it is another program's turn; decided but immovable, its owner's.
"""

import structlog

from daemon.config import Inbox as Settings
from daemon.errors import RESUMABLE, DaemonError, Reason
from daemon.hints import filled
from daemon.home import Home
from daemon.inbox import Drop, Fingerprint, Scan
from daemon.merger import Merger
from daemon.unfinished import hint_for, said_by
from projector.errors import Reason as ProjectorReason
from projector.text import shown
from registry.records import Expert
from registry.store import Store


class Lingering:
    """The entries of one inbox that stay in it. Kept for this process: a start looks at all of them anew."""

    def __init__(self, home: Home, store: Store, merger: Merger) -> None:
        self._home = home
        self._store = store
        self._merger = merger
        self._decided: dict[int, Expert] = {}
        self._seen: dict[int, Fingerprint | None] = {}
        self._gone: set[int] = set()
        self._incomplete: dict[str, DaemonError] = {}
        self._told: dict[str, str] = {}
        self._log = structlog.get_logger()

    def decided(self) -> set[str]:
        """The `entry` of each expert whose fate is recorded, and which is still there."""
        self._decided = {expert.id: expert for expert in self._store.unplaced()}
        return {expert.entry for expert in self._decided.values()}

    def look(self, scan: Scan) -> None:
        """Finishes what was decided and is gone by now, or can be moved by now; what was refused and has been mended
        where it lies is let go, to be taken anew. Raises OSError or DiskFull.
        """
        for number, expert in self._decided.items():
            now = scan.skipped.get(expert.entry)
            first, before = number not in self._seen, self._seen.get(number)
            self._seen[number] = now
            if now is not None:
                self._gone.discard(number)
                if before not in (None, now):
                    self._merger.again(expert, there=True)
            elif before is None and not first and number not in self._gone:
                # missed twice: once, something in it may just have gone. And no more: of another inbox `finish` knows
                self._gone.add(number)
                self._merger.again(expert, there=False)
        self._seen = {number: seen for number, seen in self._seen.items() if number in self._decided}
        self._gone &= self._decided.keys()

    def begin(self, drop: Drop) -> None:
        """Hears that a drop is looked at."""
        self._incomplete.pop(drop.entry, None)

    def incomplete(self, drop: Drop, error: DaemonError) -> None:
        """Hears that a drop was looked at in vain."""
        self._incomplete[drop.entry] = error
        hint = filled(error.hint, self._home.inbox / drop.name, self._home)
        self._tell(drop.name, str(error), hint, error.reason)

    def held(self, scan: Scan, settings: Settings) -> None:
        """Tells of what is held back although it has stood still for the patience."""
        for held in scan.held:
            if held.rest_seconds >= settings.patience_seconds:
                self._tell(held.name, said_by(held.waits_for), hint_for(held.waits_for))
        entries = {drop.entry for drop in scan.settled}
        names = {drop.name for drop in scan.settled} | {held.name for held in scan.held}
        self._incomplete = {entry: error for entry, error in self._incomplete.items() if entry in entries}
        self._told = {name: why for name, why in self._told.items() if name in names}

    def patient(self, scan: Scan, settings: Settings) -> bool:
        """True where all that is still there has stood still for the patience, and only another program can finish it:
        who merges once need not wait for that.
        """
        rests = [held.rest_seconds for held in scan.held]
        for drop in scan.settled:
            error = self._incomplete.get(drop.entry)
            if error is None or settings.patience_with(error.reason) <= settings.patience_seconds:
                return False
            rests.append(drop.rest_seconds)
        return not scan.moving and all(rest >= settings.patience_seconds for rest in rests)

    def soon(self, scan: Scan, waiting: int, settings: Settings) -> bool:
        """True where one of so many that wait may be ready soon: not what is incomplete beyond the patience."""
        late = [drop for drop in scan.settled if drop.rest_seconds >= settings.patience_seconds]
        return waiting > sum(drop.entry in self._incomplete for drop in late)

    def _tell(self, name: str, why: str, hint: str, reason: Reason | ProjectorReason = Reason.INCOMPLETE) -> None:
        if self._told.get(name) != why:
            self._told[name] = why
            say = self._log.warning if reason in RESUMABLE else self._log.info  # the others are refused soon
            say("it waits", drop=shown(name), reason=str(reason), detail=why, hint=hint)
