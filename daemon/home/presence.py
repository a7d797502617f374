"""What a running daemon says of itself, in state/daemon.json: for `mainstem status`, which is another process.

It is a courtesy: nothing is synced, a note that cannot be written is lost, and it counts only while a process holds the
home's lock and is the one that wrote it.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from threading import Lock
from typing import Any

from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.health import Trouble
from daemon.layout import Home
from projector.text import shown

MOST_WAITING = 100  # entries of which it is noted why they wait: the last that were looked at
SHARE_EVERY_SECONDS = 1.0  # how often it is noted how far the entry in hand is


class Doing(StrEnum):
    """What the process that holds a home's lock is at."""

    RECOVERING = "recovering"
    MERGING = "merging"
    EVALUATING = "evaluating"
    WATCHING = "watching the inbox"
    PAUSED = "paused"
    DRAINING = "draining"
    BUSY = "busy with another command of mainstem"


@dataclass(frozen=True)
class Running:
    """The process that holds a home's lock. Times in ISO 8601.

    url: where it answers HTTP, None where it does not. merging: the entry of the inbox in hand, since when, and how far
    it is, 0 to 1. evaluating_since: since when the evaluator runs for that entry.
    waiting: why each of these entries was not taken. troubles: what it noted as wrong, as `health.Trouble`.
    device: what it computes on; memory_budget: the bytes that all tensors in hand may take.
    unread: why the settings could not be read again, as far as they could not.
    """

    pid: int
    since: str
    doing: str = Doing.RECOVERING
    url: str | None = None
    merging: str | None = None
    merging_since: str | None = None
    share: float | None = None
    evaluating_since: str | None = None
    waiting: Mapping[str, str] = field(default_factory=dict)
    troubles: Sequence[Mapping[str, str]] = ()
    device: str | None = None
    memory_budget: int | None = None
    unread: str | None = None

    def why_waits(self, name: str) -> str | None:
        """Why that entry was not taken, where it was looked at; without its name, with which errors of files begin."""
        why = self.waiting.get(name)
        return why and why.removeprefix(f"{name}: ")


class Presence:
    """The note of this process. Who calls holds the home's lock. Safe to use from any thread.

    It is written when something changed, and not each time that an entry is looked at in vain.
    """

    def __init__(self, home: Home, told: Callable[[Running], object] = lambda _: None) -> None:
        """`told` hears what is said, too."""
        self._path, self._config = home.presence, home.config
        self._told = told
        self._now = Running(os.getpid(), _time(datetime.now(UTC)))
        self._there = False
        self._in_hand: tuple[str, str] | None = None
        self._resting = Doing.WATCHING
        self._share_said = 0.0  # when, by the monotonic clock
        self._saying = Lock()

    def starts(self) -> None:
        """From here on there is a note."""
        self._there = True
        self._say()

    def ends(self) -> None:
        """There is none any more."""
        self._there = False
        with suppress(OSError):
            durable.remove(self._path)

    def answers(self, url: str) -> None:
        """It answers HTTP there."""
        self._say(url=url)

    def computes(self, device: str, memory_budget: int) -> None:
        """It computes there, within so many bytes."""
        self._say(device=device, memory_budget=memory_budget)

    def watches(self) -> None:
        """It has recovered."""
        self.rests(Doing.WATCHING)

    def rests(self, doing: Doing) -> None:
        """What it does between two experts from here on."""
        self._resting = doing
        self._say(doing=doing)

    def wrong(self, troubles: Sequence[Trouble]) -> None:
        """These are all that is wrong."""
        self._say(troubles=[asdict(trouble) for trouble in troubles])

    def unread(self, why: str | None) -> None:
        """The settings could not be read again, or (None) could."""
        self._say(unread=why and why.replace(str(self._config), self._config.name))

    @contextmanager
    def merging(self, name: str) -> Iterator[None]:
        """While the entry of that name is in hand. It is said once there is progress."""
        self._in_hand = shown(name), _time(datetime.now(UTC))
        try:
            yield
        finally:
            self._in_hand = None
            if self._now.merging:
                self._say(doing=self._resting, merging=None, merging_since=None, share=None)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While the evaluator runs for the entry in hand."""
        self.progresses(1.0)
        self._say(doing=Doing.EVALUATING, evaluating_since=_time(datetime.now(UTC)))
        try:
            yield
        finally:
            self._say(doing=Doing.MERGING, evaluating_since=None)

    def progresses(self, share: float) -> None:
        """So much of the entry in hand has been done. It is noted now and then."""
        if not self._in_hand:
            return
        now = time.monotonic()
        if not self._now.merging:
            name, since = self._in_hand
            rest = {other: why for other, why in self._now.waiting.items() if other != name}
            self._share_said = now
            self._say(doing=Doing.MERGING, merging=name, merging_since=since, share=share, waiting=rest)
        elif now - self._share_said >= SHARE_EVERY_SECONDS:
            self._share_said = now
            self._say(share=share)

    def waits(self, name: str, why: str) -> None:
        """That entry was looked at and not taken."""
        name, waiting = shown(name), self._now.waiting
        if waiting.get(name) != why:
            others = [one for one in waiting.items() if one[0] != name][1 - MOST_WAITING :]
            self._say(waiting={**dict(others), name: why})

    def _say(self, **changes: Any) -> None:
        with self._saying:
            self._now = replace(self._now, **changes)
            if self._there:
                with suppress(OSError):  # a full disk, most likely
                    durable.note(self._path, json.dumps(asdict(self._now)).encode())
                self._told(self._now)


def lock(home: Home) -> int:
    """The home's lock, as a descriptor that holds it. Raises BadHome where another process holds it."""
    try:
        return durable.lock(home.lock)
    except BlockingIOError:
        hint = "stop it first; `mainstem serve` runs beside it"
        raise BadHome(f"another mainstem is running on {home.root}", hint) from None


def running(home: Home) -> Running | None:
    """The process that holds the home's lock, None where none does. OSError where the lock may not be read."""
    if not durable.is_locked(home.lock):
        return None
    pid = _pid(home.lock)
    with suppress(OSError, ValueError, TypeError):
        said = Running(**json.loads(home.presence.read_bytes()))
        if said.pid == pid:
            return said
    return Running(pid, _time(datetime.fromtimestamp(home.lock.stat().st_mtime, UTC)), Doing.BUSY)


def _pid(lock: Path) -> int:
    with suppress(ValueError):
        return int(lock.read_text())
    return 0


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")
