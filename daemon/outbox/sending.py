"""Everybody who is told, by the settings in force: a courier for each, and one connection that they write by.

No more than the list of endpoints is asked of the store that merges. What couriers write goes by a connection of their
own, a row or some fifty at a time.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self

import structlog

from daemon.config import Settings
from daemon.home.condition import condition
from daemon.layout import Home
from daemon.metrics import Metrics
from daemon.outbox.couriers import Courier
from daemon.outbox.hooking import Hooking
from daemon.outbox.posting import Posting
from daemon.outbox.stalling import Stalling
from daemon.outbox.told import Way
from registry.errors import DiskFull, RegistryError, StorageFailed
from registry.outbox import message
from registry.reader import Reader
from registry.records import Delivery, Endpoint, EndpointKind, Happening, NewEndpoint
from registry.records import Event as Told
from registry.store import Store

TURNED = (Told.PUBLISHED, Told.PROMOTED, Told.ROLLED_BACK)  # another version is live: what hooks run for
STALL = (Told.STALLED, Told.RECOVERED)
ENDING_SECONDS = 2.0
ONCE_SECONDS = 10.0  # that a run which drains once waits for those who are told; for a hook, as long as that may take
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Wanted:
    """Somebody who is to be told, and how: by these settings."""

    endpoint: NewEndpoint
    settings: object
    way: Callable[[], Way] = field(compare=False)


def endpoints(home: Home, settings: Settings) -> list[Wanted]:
    """Who is told of what, and how. Raises BadConfig where a secret cannot be read."""
    found = []
    for webhook in settings.webhooks:
        secrets = tuple(webhook.secrets(home.root))
        one = NewEndpoint(EndpointKind.WEBHOOK, webhook.url, webhook.events)
        found.append(Wanted(one, (webhook, secrets), partial(Posting, home, webhook, secrets)))
    seconds = settings.hooks.timeout_seconds
    for command in settings.hooks.published:
        one = NewEndpoint(EndpointKind.HOOK, json.dumps(command), TURNED)
        found.append(Wanted(one, seconds, partial(Hooking, home, command, seconds)))
    return found


class Sender:
    """Tells everybody. Use it as a context manager, while the home's lock is held."""

    def __init__(
        self,
        home: Home,
        store: Store,
        settings: Settings,
        metrics: Metrics,
        crashed: bool = False,
        once: Event | None = None,
    ) -> None:
        """crashed: the run before did not end by itself. once: this run ends soon, and waits a while for who is told,
        until that is set.

        On a full disk those are told who were told before. Raises BadConfig, and RegistryError.
        """
        self._home, self._store, self._metrics = home, store, metrics
        self._once = once
        self._reader = Reader.open(home.registry)
        self._own = _Own(home.registry)
        self._told: Mapping[Wanted, Courier] = {}
        self._closing = Event()
        self._watching: Thread | None = None
        self._log = structlog.get_logger()
        self._late: tuple[Settings, Sequence[Wanted]] | None = None  # what a full disk kept from being noted
        self._settings = settings
        wanted = endpoints(home, settings)
        self.adopt(settings, wanted)
        if self._late:
            known = {(one.kind, one.target): one for one in store.endpoints()}
            self._tell([one for one in wanted if (one.endpoint.kind, one.endpoint.target) in known], known)
        store.committed = self.wake
        if crashed or store.last_told(STALL) is Told.STALLED:
            reason = "crash" if crashed else "start"
            text = "the daemon runs again; the run before did not end by itself" if crashed else "the daemon runs again"
            self.announce(Happening(Told.RECOVERED, {"reason": reason, "text": text, "expert": None}))

    def adopt(self, settings: Settings, wanted: Sequence[Wanted]) -> None:
        """Tells those of the settings from here on. wanted: `endpoints` of them. Who stays as it is goes on as it did.

        On a full disk all stay as they are until `tend` finds room: other settings may be what makes it. Raises
        RegistryError.
        """
        self._late = settings, wanted
        if not self.tend():
            hint = "make room: they are then as the settings say"
            self._log.error("webhooks and hooks stay as they were: the disk is full", hint=hint)

    def tend(self) -> bool:
        """Does what a full disk was in the way of, if anything; False where it still is. Raises RegistryError."""
        if self._late:
            settings, wanted = self._late
            try:
                followed = self._store.follow_endpoints([one.endpoint for one in wanted])
            except DiskFull:
                return False
            self._settings, self._late = settings, None
            self._tell(wanted, {(one.kind, one.target): one for one in followed})
        return True

    def _tell(self, wanted: Sequence[Wanted], known: Mapping[tuple[EndpointKind, str], Endpoint]) -> None:
        before = self._told
        self._told = {one: before.get(one) or self._courier(one, known) for one in wanted}
        self._end([courier for one, courier in before.items() if one not in self._told], 0)
        for one in self._told.keys() - before.keys():
            self._told[one].start()
        self.noted()
        if self._watching is None and self._heard():
            self._watching = Thread(target=self._watch, name="stalls", daemon=True)
            self._watching.start()

    def _courier(self, wanted: Wanted, known: Mapping[tuple[EndpointKind, str], Endpoint]) -> Courier:
        endpoint = known[wanted.endpoint.kind, wanted.endpoint.target]
        return Courier(endpoint, wanted.way(), self._reader, self._own.note, self)

    @property
    def _couriers(self) -> list[Courier]:
        return list(self._told.values())

    def wake(self) -> None:
        """There may be something to tell."""
        for courier in self._couriers:
            courier.wake()

    def announce(self, happening: Happening) -> None:
        """Has it told, and be it that the registry cannot be written, as on a full disk."""
        try:
            self._own.announce(happening)
            self.wake()
        except StorageFailed as error:
            self.failed(error)
        except RegistryError:
            name, now = message(), datetime.now(UTC)
            for courier in self._couriers:
                if happening.event in courier.endpoint.events:
                    courier.speak(Delivery(0, courier.endpoint.id, name, happening.event, happening.data, now))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.committed = lambda: None
        self._closing.set()
        if self._once and kind is None:
            self._let_finish(self._once)
        self._end(self._couriers, ENDING_SECONDS)
        if self._watching:
            self._watching.join(ENDING_SECONDS)
        self._own.close()
        self._reader.close()

    def _let_finish(self, stopping: Event) -> None:
        begun, hook = time.monotonic(), max(ONCE_SECONDS, self._settings.hooks.timeout_seconds)
        for courier in self._couriers:
            end = begun + (hook if courier.endpoint.kind is EndpointKind.HOOK else ONCE_SECONDS)
            while not stopping.is_set() and time.monotonic() < end and not courier.idle(LOOK_SECONDS):
                pass

    def _end(self, couriers: Sequence[Courier], seconds: float) -> None:
        for courier in couriers:
            courier.close()
        end = time.monotonic() + seconds
        for courier in couriers:
            courier.join(end - time.monotonic())

    def _heard(self) -> bool:
        return any(event in courier.endpoint.events for courier in self._couriers for event in STALL)

    def tried(self, outcome: str) -> None:
        """Counts an attempt."""
        self._metrics.webhook_deliveries.labels(outcome).inc()

    def noted(self) -> None:
        """Counts what is still to be told. Raises RegistryError."""
        pending, dead = self._reader.count_undelivered()
        self._metrics.webhook_pending.set(pending)
        self._metrics.webhook_dead_letters.set(dead)

    def failed(self, error: StorageFailed) -> None:
        """The disk failed: nothing may be written any more."""
        self._store.fail(error)

    def _watch(self) -> None:
        stalling = Stalling()
        while not self._closing.wait(min(30.0, self._settings.hooks.stalled_seconds / 10)):
            try:
                found = condition(self._home, self._reader)
                told = stalling.look(found, time.monotonic(), self._settings.hooks.stalled_seconds)
                if told and self._heard():
                    self.announce(told)
            except (OSError, RegistryError) as error:
                self._log.debug("whether anything goes on cannot be told now", error=str(error))


class _Own:
    """The couriers' own way to write: a store, opened once something is to be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._store: Store | None = None
        self._opening = Lock()

    def note(self, deliveries: Sequence[Delivery]) -> None:
        self._opened().note_deliveries(deliveries)

    def announce(self, happening: Happening) -> None:
        self._opened().announce(happening)

    def _opened(self) -> Store:
        with self._opening:
            self._store = self._store or Store.open(self._path)
            return self._store

    def close(self) -> None:
        with self._opening:
            if self._store:
                self._store.close()
