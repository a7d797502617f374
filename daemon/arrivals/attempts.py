"""How often each entry of the inbox was tried in vain: no expert may end the daemon for ever, or block those behind it.

A try that fails is counted, others go first, and after TRIES it is refused. A process that is killed with an expert in
hand (out of memory, a crash of a library) is known by the note that it leaves. That may have been a person: FORGIVEN
times change nothing, not even the order of merging, then others go first, and it takes DEATHS to refuse it, all with
this expert alone. Where a second one in a row would be refused for that, it is rather the home or the machine, and the
daemon ends. What is no expert's doing leaves no note: a stop by SIGTERM takes it away even if it is followed by
SIGKILL, and a note of another boot, after a power failure, does not count.
"""

import json
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from daemon.arrivals.inbox import Drop
from daemon.disk import durable
from daemon.errors import BadHome, Failed, Reason
from daemon.layout import Home
from projector.text import shown
from registry.records import Expert, Status

TRIES = 3
DEATHS = 5
FORGIVEN = 2
AGAIN_SECONDS = 5.0  # between two tries
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Tried:
    """Of one entry: how many tries failed, and how many processes died with it in hand."""

    failures: int = 0
    deaths: int = 0


class Attempts:
    """The tries of one home, kept beside its state. The caller holds the home's lock."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._boot = BOOT.read_text().strip() if BOOT.exists() else ""
        self._tried, self._blamed = _read(home.attempts)
        self._again: dict[str, float] = {}
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            note = json.loads(home.in_hand.read_bytes())
            if note["boot"] == self._boot:
                self._of(str(note["entry"])).deaths += 1
                self._write()
        durable.remove(home.in_hand)

    def decided(self, drop: Drop, decide: Callable[[Drop], Expert], refuse: Callable[[Drop, Failed], Expert]) -> Expert:
        """What becomes of a drop, which is in hand until it is let go: refused where it was tried too often. Raises as
        `decide` does.
        """
        if killed := self.killed(drop):
            return refuse(drop, killed)
        self.begin(drop)
        try:
            expert = decide(drop)
        except Failed as error:
            if not self.failed(drop):
                self.let_go()
                raise
            return refuse(drop, error)
        except BaseException:
            self.let_go()
            raise
        if expert.status is Status.MERGED:
            self.merged()
        return expert

    def begin(self, drop: Drop) -> None:
        """Notes that the drop is in hand."""
        durable.note(self._home.in_hand, json.dumps({"entry": drop.entry, "boot": self._boot}).encode())

    def let_go(self) -> None:
        """Nothing is in hand any more, or what becomes of this process is not the drop's doing."""
        durable.remove(self._home.in_hand)

    def failed(self, drop: Drop) -> bool:
        """Counts a try that failed; True where it was the last."""
        tried = self._of(drop.entry)
        tried.failures += 1
        self._again[drop.entry] = time.monotonic() + AGAIN_SECONDS
        self._write()
        return tried.failures >= TRIES

    def killed(self, drop: Drop) -> Failed | None:
        """Why a drop must not be tried again, where processes died of it and of nothing else.

        Raises BadHome where the last to be tried was refused for the same: the next start tries this one anew.
        """
        others = [tried.deaths for entry, tried in self._tried.items() if entry != drop.entry]
        deaths = self._tried.get(drop.entry, Tried()).deaths
        if deaths < DEATHS or max(others, default=0) >= FORGIVEN:
            return None
        name = shown(drop.name)
        if self._blamed:
            del self._tried[drop.entry]
            self._write()
            raise BadHome(
                f"the daemon was killed {deaths} times while it merged {name}, and before as often while it merged "
                f"{self._blamed}, which was refused: nothing was merged in between",
                "look into the system's log (out of memory?), give the daemon more or set compute.memory_budget, start "
                f"again, and drop {self._blamed} again; if it is these two alone, move {name} out of the inbox",
            )
        self._blamed = name
        self._write()
        return Failed(
            Reason.FAULT,
            f"the daemon was killed {deaths} times while it merged this",
            "look into the system's log (out of memory?), give the daemon more or set compute.memory_budget, and drop "
            "it again",
        )

    def merged(self) -> None:
        """An expert was merged: neither the home nor the machine is what others died of."""
        if self._blamed:
            self._blamed = None
            self._write()

    def order(self, drops: Sequence[Drop]) -> list[Drop]:
        """Those that may be tried now: who was tried in vain after the others."""
        now = time.monotonic()
        due = [drop for drop in drops if self._again.get(drop.entry, now) <= now]
        return sorted(due, key=lambda drop: _last(self._tried.get(drop.entry, Tried())))

    def keep(self, entries: Collection[str]) -> None:
        """Forgets the tries of all others: they were taken, or somebody took them away."""
        if gone := self._tried.keys() - entries:
            for entry in gone:
                del self._tried[entry]
                self._again.pop(entry, None)
            self._write()

    def _of(self, entry: str) -> Tried:
        return self._tried.setdefault(entry, Tried())

    def _write(self) -> None:
        if not self._tried and not self._blamed:
            durable.remove(self._home.attempts)
            return
        tries = {entry: [tried.failures, tried.deaths] for entry, tried in self._tried.items()}
        content = {"tries": tries, "blamed": self._blamed}
        try:
            durable.note(self._home.attempts, json.dumps(content).encode())
        except OSError as error:  # a count that is lost with this process is no reason to end it
            if not durable.is_full(error):
                raise


def _last(tried: Tried) -> int:
    return tried.failures + max(0, tried.deaths - FORGIVEN)


def _read(path: Path) -> tuple[dict[str, Tried], str | None]:
    """What an earlier process noted: the tries, and who was blamed last; nothing where a power failure left no whole
    note.
    """
    with suppress(FileNotFoundError, ValueError, TypeError, AttributeError, KeyError):
        content = json.loads(path.read_bytes())
        tried = {str(entry): Tried(int(f), int(d)) for entry, (f, d) in content["tries"].items()}
        return tried, content["blamed"]
    return {}, None
