"""One endpoint's deliveries: made in the order of what happened, one at a time, each until it is made or given up.

A thread of its own for each endpoint, which reads the registry and writes down what became of some deliveries at once.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Event, Lock, Thread
from typing import Protocol

import structlog

from daemon.disk.failpoints import hit
from daemon.outbox.told import Answer, Way
from registry.errors import Busy, DiskFull, RegistryError, StorageFailed
from registry.outbox import MOST_ROWS
from registry.reader import Reader
from registry.records import Delivery, Endpoint, EndpointKind, Outcome

MOST_ATTEMPTS = 12  # over some five hours
FIRST_PAUSE_SECONDS, PAUSE_FACTOR, MOST_PAUSE_SECONDS = 2.0, 3.0, 3600.0
LONGEST_REST_SECONDS = 1.5 * MOST_PAUSE_SECONDS  # after any attempt
BATCH = 50  # deliveries that are made before they are written down
MOST_KNOWN = 200  # that are made while they cannot be written down
NOTE_SECONDS = 1.0  # what was delivered is written down within that, while more follows
LOOK_SECONDS = 30.0  # all that is new is told by `wake`
SHORT_SECONDS = 1.0  # until a registry that is busy, or full, is asked again
FAULT_SECONDS = 60.0

Note = Callable[[Sequence[Delivery]], None]
"""Writes down what became of some deliveries, in the registry. Raises RegistryError."""


class Hears(Protocol):
    """Hears of what a courier does."""

    def tried(self, outcome: str) -> None:
        """An attempt came to that: "delivered", "failed" or "dead"."""

    def noted(self) -> None:
        """What became of deliveries is written down. Raises RegistryError."""

    def failed(self, error: StorageFailed) -> None:
        """The disk failed, and the courier has ended: only a new start helps."""


def pause_seconds(attempts: int) -> float:
    """How long to wait after so many attempts in vain, on average; up to half as much is added or taken away."""
    return min(MOST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * PAUSE_FACTOR ** (attempts - 1))


class Courier:
    """Tells one endpoint."""

    def __init__(self, endpoint: Endpoint, way: Way, reader: Reader, note: Note, hears: Hears) -> None:
        self.endpoint = endpoint
        self.way = way
        self._reader, self._note, self._hears = reader, note, hears
        self._known: dict[int, Delivery] = {}  # what became of deliveries, and is not written down yet
        self._spoken: list[Delivery] = []  # what the registry could not take
        self._speaking = Lock()
        self._failed: Delivery | None = None  # the last one, where that failed
        self._woken, self._closing, self._idle = Event(), Event(), Event()
        self._log = structlog.get_logger().bind(to=endpoint.target)
        self._thread = Thread(target=self._work, name=f"courier-{endpoint.id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be something to tell."""
        self._idle.clear()
        self._woken.set()

    def speak(self, delivery: Delivery) -> None:
        """Tells that too, although the registry does not know of it."""
        with self._speaking:
            self._spoken.append(delivery)
        self.wake()

    def idle(self, seconds: float) -> bool:
        """Waits until all that is due was tried; False where the time was over before."""
        return self._idle.wait(max(0.0, seconds))

    def close(self) -> None:
        """Begins nothing more, and cuts short what it is at."""
        self._closing.set()
        self.way.abort()
        self.wake()

    def join(self, seconds: float) -> None:
        """Waits for its end, but not for a name server that does not answer."""
        if self._thread.ident:
            self._thread.join(max(0.0, seconds))

    def _work(self) -> None:
        while not self._closing.is_set():
            self._woken.clear()
            try:
                pause = self.round()
            except StorageFailed as error:
                self._hears.failed(error)
                return
            except RegistryError as error:
                self._log.warning("the registry cannot be asked what is to be told", error=str(error), hint=error.hint)
                pause = FAULT_SECONDS
            except Exception as error:  # whatever it is, merging goes on
                self._log.error("a fault of the program while telling others", error=repr(error), exc_info=True)
                pause = FAULT_SECONDS
            if pause and not self._woken.is_set():
                self._idle.set()
            self._woken.wait(pause)
        with suppress(RegistryError):
            self._write_down()

    def round(self) -> float:
        """Makes the deliveries that are due; the seconds until there may be more to do. Raises RegistryError."""
        due, since = self._due(), time.monotonic()
        if not self._write_down() and len(self._known) >= MOST_KNOWN:
            return SHORT_SECONDS
        for delivery in due:
            if rest := self._rest_seconds(delivery):
                return rest
            if self._closing.is_set():
                return 0
            if not self._tried(delivery) or time.monotonic() - since > NOTE_SECONDS:
                return 0
        if not self._write_down():
            return SHORT_SECONDS
        return 0 if len(due) >= BATCH else LOOK_SECONDS

    def _rest_seconds(self, delivery: Delivery) -> float:
        """How long to wait before it is tried. Where the one before it was dropped, a webhook waits as it did for that;
        a hook is tried at once with a newer version.
        """
        last, until = self._failed, delivery.next_at
        if last and delivery.id > last.id and self.endpoint.kind is EndpointKind.WEBHOOK:
            until = last.next_at
        rest = max(0.0, (until - datetime.now(UTC)).total_seconds()) if until else 0.0
        return rest if rest <= LONGEST_REST_SECONDS else 0.0  # the clock was another one when that was written down

    def _due(self) -> list[Delivery]:
        """What is to be told, in order."""
        with self._speaking:
            spoken = list(self._spoken)
        hook = self.endpoint.kind is EndpointKind.HOOK
        most = MOST_ROWS if hook else BATCH
        pending = self._reader.pending(self.endpoint.id, most + len(self._known))
        left = [one for one in (self._known.get(one.id, one) for one in pending) if one.outcome is Outcome.PENDING]
        if hook:  # the newest of each head says it all
            newest = {one.data.get("head"): one for one in left}
            overtaken = [one for one in left if newest[one.data.get("head")] is not one]
            self._known |= {one.id: replace(one, outcome=Outcome.OVERTAKEN, next_at=None) for one in overtaken}
            left = list(newest.values())
        return [*spoken, *left]

    def _tried(self, delivery: Delivery) -> bool:
        """Tries one; False where what comes after it has to wait for it."""
        answer = self.way.deliver(delivery)
        if self._closing.is_set() and not answer.delivered:
            return False  # we ended it ourselves
        if answer.delivered:
            hit("delivery.made")
        after = _after(delivery, answer)
        self._failed = None if answer.delivered else after
        self._keep(delivery, after)
        return answer.delivered

    def _keep(self, before: Delivery, after: Delivery) -> None:
        if before.id:
            self._known[before.id] = after
        else:
            with self._speaking:
                place = self._spoken.index(before)
                self._spoken[place : place + 1] = [after] if after.outcome is Outcome.PENDING else []
        told = {"id": after.id or None, "what": after.event, "message": after.message, "attempt": after.attempts}
        if after.outcome is Outcome.DELIVERED:
            self._log.info("told", **told, answer=after.answer)
        elif after.outcome is Outcome.DEAD:
            hint = f"`mainstem webhooks redeliver {after.id}` tries it again, `--all-dead` all of them"
            self._log.error("given up: it was not told", **told, answer=after.answer, hint=hint)
        else:
            self._log.warning("not told yet", **told, answer=after.answer, next=str(after.next_at))
        self._hears.tried("failed" if after.outcome is Outcome.PENDING else str(after.outcome))

    def _write_down(self) -> bool:
        """Writes down what became of deliveries; False where the registry takes nothing now. Raises RegistryError."""
        if self._known:
            done = dict(self._known)
            try:
                self._note(list(done.values()))
            except (Busy, DiskFull):
                return False
            self._known = {key: one for key, one in self._known.items() if done.get(key) is not one}
        self._hears.noted()
        return True


def _after(delivery: Delivery, answer: Answer) -> Delivery:
    """What became of it with that answer."""
    now, attempts = datetime.now(UTC), delivery.attempts + 1
    after = replace(delivery, attempts=attempts, tried_at=now, next_at=None, answer=answer.text)
    if answer.delivered:
        return replace(after, outcome=Outcome.DELIVERED)
    if attempts >= MOST_ATTEMPTS:
        return replace(after, outcome=Outcome.DEAD)
    pause = pause_seconds(attempts) * random.uniform(0.5, 1.5)
    return replace(after, next_at=now + timedelta(seconds=max(pause, answer.again_seconds or 0)))
