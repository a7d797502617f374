"""What is going on in a home right now, in words, for everybody who shows it.

It comes from the daemon's note of itself, the lock, the registry and the inbox: a daemon sees itself no otherwise than
a process beside it does.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from daemon.checkpoints.unfinished import TEMPORARY
from daemon.home.health import Health, Trouble
from daemon.home.orders import order
from daemon.home.presence import Doing, Running, running
from daemon.layout import Home
from projector.text import duration, shown
from registry.errors import RegistryError
from registry.reader import Reader

NOBODY = "no daemon runs"
LONGEST = 10_000  # entries of the inbox that are looked at
MEND = "`mainstem config check` says what is wrong with them; mend them, then `mainstem reload`"
SENTENCE = 400  # letters
ENOUGH = 0.02  # of an expert, for what is left of it to be foretold
WAITING, DAMAGED, NONE = "waiting", "damaged", "no daemon"
DOINGS = (*Doing, WAITING, DAMAGED, NONE)
HINDERS = ("disk_full", "no_inbox", "registry")  # troubles that merging waits for the end of


@dataclass(frozen=True, slots=True)
class Waiting:
    """An entry of the inbox, why it was not taken yet, and since when it lies there as it is (None: it is gone)."""

    name: str
    why: str
    since: datetime | None

    def described(self) -> dict[str, str | None]:
        """Ready for JSON."""
        since = self.since.isoformat(timespec="seconds") if self.since else None
        return {"name": self.name, "why": self.why, "since": since}


@dataclass(frozen=True, slots=True)
class Condition:
    """What is going on.

    doing: a word: one of `presence.Doing`, or WAITING, DAMAGED or NONE. text: the same in a sentence. expert: the entry
    in hand, with the share of it that is done and the seconds that are left, as far as they can be told. waiting: all
    that lies in the inbox, what is there longest first; None where this user may not list it. troubles: what is wrong.
    """

    doing: str
    text: str
    since: datetime | None
    expert: str | None
    share: float | None
    left_seconds: float | None
    waiting: Sequence[Waiting] | None
    troubles: Sequence[Trouble]
    daemon: Running | None

    def queue(self) -> list[dict[str, str | None]] | None:
        """What waits, ready for JSON."""
        return None if self.waiting is None else [one.described() for one in self.waiting]


def condition(home: Home, reader: Reader, now: datetime | None = None) -> Condition:
    """What is going on in a home. One that cannot be seen by this user is one in which no daemon runs."""
    now = now or datetime.now(UTC)
    try:
        daemon = running(home)
    except OSError:
        daemon = None
    noted = _noted(daemon)
    known = {one.reason for one in noted}
    seen = [one for one in Health(home).troubles(reader, beside=True) if one.reason not in known]
    troubles = [*noted, *seen, *_unread(daemon)]
    waiting = _waiting(home, _decided(reader), daemon, noted)
    share = daemon.share if daemon else None
    left = _left(daemon, now)
    doing, text = _words(daemon, troubles, waiting, share, left, now)
    if given := order(home):
        text = given.text(now) if doing == Doing.PAUSED else f"{text}; {given.text(now)}"
    since = daemon and (daemon.evaluating_since or daemon.merging_since or daemon.since)
    merging = daemon.merging if daemon else None
    return Condition(
        doing, text, datetime.fromisoformat(since) if since else None, merging, share, left, waiting, troubles, daemon
    )


def said_of_itself(daemon: Running) -> str:
    """What a daemon is at, in a sentence, by its own note alone."""
    if daemon.doing == Doing.WATCHING and not daemon.troubles:
        return daemon.doing  # what lies in the inbox it does not say
    now = datetime.now(UTC)
    return _words(daemon, _noted(daemon), None, daemon.share, _left(daemon, now), now)[1]


def entry(home: Home, reader: Reader, name: str) -> tuple[str, Waiting] | None:
    """What is going on with one entry of the inbox, in a word and more; None where there is none that is still to be
    decided. OSError where the inbox may not be looked at.
    """
    try:
        since = _since(home.inbox / name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    decided, daemon = _decided(reader), running(home)
    if shown(name) in decided:
        return None
    word = Doing.MERGING if daemon and daemon.merging == shown(name) else WAITING
    return word, Waiting(shown(name), _why(shown(name), daemon, decided, _noted(daemon)), since)


def _noted(daemon: Running | None) -> list[Trouble]:
    """What the daemon itself noted as wrong."""
    return [Trouble(**one) for one in daemon.troubles] if daemon else []


def _unread(daemon: Running | None) -> list[Trouble]:
    """That a daemon could not read its settings again: no trouble of its own, for it goes on with those that it has."""
    if daemon is None or daemon.unread is None:
        return []
    return [Trouble("settings", f"the settings could not be read again: {shown(daemon.unread, SENTENCE)}", MEND)]


def _since(path: Path) -> datetime:
    """Since when an entry lies there as it is. Not the mtime: that is the trainer's, and a folder that was copied with
    its times looks old. OSError where it is gone."""
    return datetime.fromtimestamp(path.lstat().st_ctime, UTC)


def _words(
    daemon: Running | None,
    troubles: Sequence[Trouble],
    waiting: Sequence[Waiting] | None,
    share: float | None,
    left: float | None,
    now: datetime,
) -> tuple[str, str]:
    """The word and the sentence. What is worst comes first."""
    for one in troubles:
        if one.reason == "damaged":
            return DAMAGED, one.text
    if daemon is None:
        return NONE, f"{NOBODY}: start `mainstem run`"
    for one in troubles:
        if one.reason in HINDERS:
            return WAITING, one.text
    if daemon.evaluating_since:
        spent = now - datetime.fromisoformat(daemon.evaluating_since)
        return daemon.doing, f"{daemon.doing} what comes of {daemon.merging}, for {duration(spent.total_seconds())}"
    if daemon.merging:
        far = f": {share:.0%}" if share is not None else ""
        rest = f", about {duration(left)} left" if left is not None else ""
        return daemon.doing, f"{daemon.doing} {daemon.merging}{far}{rest}"
    if daemon.doing == Doing.WATCHING:
        return daemon.doing, f"{daemon.doing}: {len(waiting)} waiting" if waiting else "idle: nothing waits"
    return daemon.doing, daemon.doing


def _left(daemon: Running | None, now: datetime) -> float | None:
    """The seconds until the expert in hand is merged, were it to go on as it began. Nobody knows how long an evaluator
    takes."""
    if (
        not daemon
        or daemon.evaluating_since
        or not daemon.merging_since
        or daemon.share is None
        or daemon.share < ENOUGH
    ):
        return None
    spent = (now - datetime.fromisoformat(daemon.merging_since)).total_seconds()
    return max(0.0, spent * (1 - daemon.share) / daemon.share)


def _decided(reader: Reader) -> set[str]:
    """What is still in the inbox although it was decided, by name."""
    try:
        return {shown(expert.name) for expert in reader.unplaced()}
    except RegistryError:  # the troubles say so
        return set()


def _waiting(
    home: Home, decided: set[str], daemon: Running | None, noted: Sequence[Trouble]
) -> Sequence[Waiting] | None:
    try:
        with os.scandir(home.inbox) as there:
            names = [one.name for one, _ in zip(there, range(LONGEST), strict=False)]
    except PermissionError:
        return None
    except (FileNotFoundError, NotADirectoryError):
        return []  # the troubles say so
    found = []
    for name in names:
        if not TEMPORARY.fullmatch(name):
            try:
                since = _since(home.inbox / name)
            except OSError:
                since = None
            found.append(Waiting(shown(name), _why(shown(name), daemon, decided, noted), since))
    return sorted(found, key=lambda one: (one.since or datetime.max.replace(tzinfo=UTC), one.name))


def _why(name: str, daemon: Running | None, decided: set[str], noted: Sequence[Trouble]) -> str:
    if name in decided:
        return "decided, but it could not be moved out of the inbox"
    if daemon is None or daemon.doing == Doing.BUSY:
        return NOBODY
    if name == daemon.merging:
        verb = "evaluated" if daemon.evaluating_since else "merged"
        return f"being {verb} since {daemon.evaluating_since or daemon.merging_since}"
    if (why := daemon.why_waits(name)) is not None:
        return why
    if daemon.doing == Doing.PAUSED:
        return "merging is paused"
    if noted:
        return noted[0].text
    return "the daemon is recovering" if daemon.doing == Doing.RECOVERING else "waits to come to rest, or for its turn"
