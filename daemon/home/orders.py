"""What a person told the merge loop: to pause, or to finish the queue and stop. In state/order.json, durably.

A pause outlives every restart; a drain outlives a crash, and ends with the daemon that has stopped in order. The last
order counts. Whoever holds the home's lock gives it (`daemon.interventions`); anybody may read it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from itertools import takewhile
from typing import TYPE_CHECKING

from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.presence import Doing, Presence, running
from daemon.layout import Home
from projector.text import duration, shown
from registry.records import Deed

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from daemon.arrivals.inbox import Drop, Scan


class Kind(StrEnum):
    """What is ordered."""

    PAUSE = "pause"
    DRAIN = "drain"


ORDERS = (Deed.PAUSE, Deed.RESUME, Deed.DRAIN)
DOING = {Kind.PAUSE: Doing.PAUSED, Kind.DRAIN: Doing.DRAINING, None: Doing.WATCHING}


@dataclass(frozen=True)
class Order:
    """One order. since: in ISO 8601. who: a user's name."""

    kind: Kind
    since: str
    who: str
    why: str | None = None

    @property
    def meaning(self) -> str:
        """What it means, in words."""
        return "merging is paused" if self.kind is Kind.PAUSE else "the queue is finished, then the daemon stops"

    @property
    def because(self) -> str:
        """Why, in words behind others."""
        return f" ({shown(self.why)})" if self.why else ""

    def text(self, now: datetime | None = None) -> str:
        """The same, with how long merging has been paused, who asked for it and why."""
        by = f"by {self.who}{self.because}"
        if self.kind is Kind.DRAIN:
            return f"{self.meaning}: asked for {by}"
        try:
            spent = (now or datetime.now(UTC)) - datetime.fromisoformat(self.since)
        except (ValueError, TypeError):  # of an order that cannot be read
            return f"{self.meaning}, {by}"
        return f"{self.meaning} for {duration(spent.total_seconds())}, {by}"


def order(home: Home) -> Order | None:
    """The order in force; a pause where it cannot be read, for somebody gave one."""
    try:
        content = json.loads(home.order.read_bytes())
        return Order(**{**content, "kind": Kind(content["kind"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        return Order(Kind.PAUSE, "-", "-", f"{home.order.name} cannot be read")


def planned(home: Home, deed: Deed) -> list[str]:
    """What the deed would do, in lines of words; none where it is so already."""
    now, daemon = order(home), running(home)
    kind = now.kind if now else None
    if deed is Deed.PAUSE and kind is not Kind.PAUSE:
        last = f": {daemon.merging} is finished first" if daemon and daemon.merging else ""
        return [f"no expert is taken until `mainstem resume`{last}; what arrives waits in the inbox"]
    if deed is Deed.DRAIN and kind is not Kind.DRAIN:
        ended = [f"that ends what {now.who} asked for: merging was paused{now.because}"] if now else []
        return ["what is in the inbox now is decided, then the daemon stops; `mainstem resume` calls it off", *ended]
    if deed is Deed.RESUME and kind:
        return ["merging goes on" if kind is Kind.PAUSE else "the daemon goes on when the queue is finished"]
    return []


def give(home: Home, deed: Deed, who: str, why: str | None) -> None:
    """Puts it into force, durably; Deed.RESUME ends what was in force."""
    if deed is Deed.RESUME:
        durable.remove(home.order)
        durable.sync_folder(home.order.parent)
        return
    kind = Kind.PAUSE if deed is Deed.PAUSE else Kind.DRAIN
    given = Order(kind, datetime.now(UTC).isoformat(timespec="seconds"), who, why)
    durable.replace_file(home.order, json.dumps(asdict(given)).encode())


def fulfilled(home: Home) -> None:
    """Ends a drain: the daemon stops in order."""
    if (now := order(home)) and now.kind is Kind.DRAIN:
        give(home, Deed.RESUME, now.who, now.why)


def leave(home: Home, deed: Deed, who: str, why: str | None) -> list[str]:
    """Gives an order beside a process that answers nothing now, and finds it later; what it means, in lines."""
    lines = planned(home, deed)
    if lines:
        give(home, deed, who, why)
        lines.append("it is found once the home's lock is free, or its daemon has recovered; no row tells of it")
    return lines


class Orders:
    """The orders, as the merge loop follows them: looked at between two experts, and told to whoever asks."""

    def __init__(self, home: Home, presence: Presence, log: "FilteringBoundLogger", *, once: bool) -> None:
        self._home = home
        self._presence = presence
        self._once = once
        self._now: Order | None = None
        self._queue: frozenset[str] | None = None  # what a drain began with
        self._drains = False  # by an order that is older than the newest list of the inbox
        self._log = log

    @property
    def paused(self) -> bool:
        """Whether no expert is to be taken now. Raises BadHome where it drains once: nobody is there to wait."""
        now = self._look()
        if now is None or now.kind is not Kind.PAUSE:
            return False
        if self._once:
            raise BadHome(now.text(), "`mainstem resume` ends that; then run it again")
        return True

    @property
    def draining(self) -> bool:
        """Whether the daemon stops once the queue is finished: that of a list which was made after it was told so."""
        return self._drains and self._is_drain()

    def lists(self) -> None:
        """Hears that the inbox is about to be listed."""
        self._drains = self._is_drain()

    def _is_drain(self) -> bool:
        now = self._look()
        return now is not None and now.kind is Kind.DRAIN

    def allowed(self, drops: "Sequence[Drop]", scan: "Scan") -> "list[Drop]":
        """Those that may be taken: none while paused, and of a drain those that it began with."""
        if self.paused:
            return []
        if not self.draining:
            self._queue = None
        elif self._queue is None:
            held = {one.name for one in scan.held}
            self._queue = frozenset({drop.name for drop in scan.settled} | held | scan.moving_names)
        return [drop for drop in drops if self._queue is None or drop.name in self._queue]

    def until_paused(self, drops: "Iterable[Drop]") -> "Iterator[Drop]":
        """One after the other, until somebody pauses."""
        return takewhile(lambda _: not self.paused, drops)

    def queue(self, scan: "Scan") -> "Scan":
        """What is still to be decided before a drain is over; all of it where nothing drains."""
        if self._queue is None:
            return scan
        moving = scan.moving_names & self._queue
        settled = [drop for drop in scan.settled if drop.name in self._queue]
        held = [one for one in scan.held if one.name in self._queue]
        return replace(scan, settled=settled, moving=len(moving), held=held, moving_names=moving)

    def _look(self) -> Order | None:
        now = order(self._home)
        if now != self._now:
            self._now = now
            if now:
                told = {"since": now.since, "who": now.who, "why": now.why}
                self._log.warning(now.meaning, **told, hint="`mainstem resume` ends that")
            else:
                self._log.info("merging goes on")
            self._presence.rests(DOING[now.kind if now else None])
        return now
