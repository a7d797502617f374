"""What lies in the inbox, and which of it has come to rest.

Events are hints, the scan is the truth: an entry counts as settled when its fingerprint (of every file in it and below:
size, times, inode) has not changed for `settle_seconds`, or at once where a folder brings the marker file _READY. What
another program says it is still writing is held back for as long as that is said. No clock but ours counts: the times
of files are only ever compared with themselves.
"""

import os
import stat
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from daemon.checkpoints.opening import READY_MARKER, stamp
from daemon.checkpoints.unfinished import TEMPORARY as TEMPORARY
from daemon.checkpoints.unfinished import hint_for, noted, said_by, unfinished
from daemon.disk.durable import MOST_LEVELS
from daemon.errors import NotYet, Reason

Fingerprint = tuple[object, ...]


@dataclass(frozen=True)
class Drop:
    """One settled entry of the inbox. `rest_seconds`: how long it had been standing still when it was listed."""

    name: str
    entry: str  # "device:inode:mtime", which finds it again after a crash, under whatever name
    mtime_ns: int
    size_bytes: int
    rest_seconds: float
    listed_at: float = field(default_factory=time.monotonic, compare=False)

    @property
    def waited_seconds(self) -> float:
        """How long it has been standing still by now: others of the same listing may have been taken before it."""
        return self.rest_seconds + time.monotonic() - self.listed_at


@dataclass(frozen=True)
class Held:
    """An entry that another program is still writing, as a file beside it or in it tells, and for how long it has been
    standing still all the same. `waits_for`: that file, relative to the inbox.
    """

    name: str
    waits_for: str
    rest_seconds: float


@dataclass(frozen=True)
class Scan:
    """The inbox at one moment: what is settled, oldest first, how many entries still move, and what is held back.

    skipped: of the entries that were to be skipped, by their `entry`, the fingerprint.
    """

    settled: list[Drop]
    moving: int
    held: Sequence[Held] = ()
    skipped: Mapping[str, Fingerprint] = field(default_factory=dict)
    moving_names: frozenset[str] = frozenset()


class Inbox:
    """Lists the inbox and remembers since when each entry has been standing still."""

    def __init__(self, path: Path, settle_seconds: float, clock: Callable[[], float]) -> None:
        self._path = path
        self.settle_seconds = settle_seconds
        self._clock = clock
        self._since: dict[str, tuple[Fingerprint, float]] = {}

    def scan(self, skip: Container[str] = ()) -> Scan:
        """Lists the inbox. Entries with temporary names, and those whose `entry` is to be skipped, do not count."""
        now = self._clock()
        settled: list[Drop] = []
        held: list[Held] = []
        skipped: dict[str, Fingerprint] = {}
        since: dict[str, tuple[Fingerprint, float]] = {}
        names = os.listdir(self._path)
        notes = noted(names)
        for name in set(names).difference(notes.values()):
            if TEMPORARY.fullmatch(name):
                continue
            try:
                look = _look(self._path / name)
            except OSError:  # it went, or a file took its place, just now; or its file system does not know what it is
                continue
            if look.entry in skip:
                skipped[look.entry] = look.fingerprint
                continue
            before = self._since.get(name)
            since[name] = before if before and before[0] == look.fingerprint else (look.fingerprint, now)
            rest = now - since[name][1]
            if note := notes.get(name) or (look.unfinished and f"{name}/{look.unfinished}"):
                held.append(Held(name, note, rest))
            elif look.ready or rest >= self.settle_seconds:
                settled.append(Drop(name, look.entry, look.mtime_ns, look.size_bytes, rest))
        self._since = since
        settled.sort(key=lambda drop: (drop.mtime_ns, drop.name))
        moving = frozenset(since).difference((drop.name for drop in settled), (one.name for one in held))
        return Scan(settled, len(moving), held, skipped, moving)


def entry_id(path: Path) -> str:
    """What stays the same when an entry is moved, or a note is laid beside the weights, and hardly ever comes again.

    Device, inode and the time of the last change to the weights. Raises OSError where there is no such entry.
    """
    return _look(path).entry


def fingerprint(path: Path) -> Fingerprint:
    """What changes when anything in an entry does. Raises OSError where there is no such entry."""
    return _look(path).fingerprint


def check_finished(path: Path) -> None:
    """Raises NotYet where a file beside a path that a person names, or in it, tells that it is still being written, or
    OSError where there is no such path.
    """
    if note := noted(os.listdir(path.parent)).get(path.name) or _look(path).unfinished:
        raise NotYet(Reason.INCOMPLETE, said_by(note), hint_for(note))


class Watcher:
    """Sets `wake` when something in the inbox changes. Where events do not come, the caller's rescans must do."""

    def __init__(self, path: Path, wake: Event) -> None:
        self._observer: BaseObserver = Observer()
        self._observer.schedule(_Waker(wake), str(path), recursive=False)

    def start(self) -> None:
        """Starts listening. Raises OSError where the system offers no (more) watches."""
        self._observer.start()

    def stop(self) -> None:
        self._observer.stop()
        self._observer.join()


class _Waker(FileSystemEventHandler):
    def __init__(self, wake: Event) -> None:
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        # neither our own reading nor every single write of an upload; its end is seen when it closes or at a rescan
        if event.event_type in ("created", "moved", "closed", "deleted"):
            self._wake.set()


@dataclass(frozen=True)
class _Look:
    """What one look at an entry shows. unfinished: the path in it of what is not finished, if anything is."""

    fingerprint: Fingerprint
    entry: str
    mtime_ns: int
    size_bytes: int
    ready: bool = False
    unfinished: str | None = None


def _look(path: Path) -> _Look:
    """One stat for each file. Raises OSError where there is no such entry, or something in it went just now."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return _Look(stamp(status), _entry(status, status.st_mtime_ns), status.st_mtime_ns, status.st_size)
    below = _below(path)
    weights = {name: one.st_mtime_ns for name, one in below.items() if name.endswith(".safetensors")}
    changed = [mtime for name, mtime in weights.items() if "/" not in name] or weights.values()
    return _Look(
        (stamp(status), *((name, stamp(below[name])) for name in sorted(below))),
        _entry(status, max(changed, default=0)),
        status.st_mtime_ns,
        sum(one.st_size for one in below.values() if not stat.S_ISDIR(one.st_mode)),
        READY_MARKER in below,
        unfinished(below),
    )


def _entry(status: os.stat_result, weights_changed: int) -> str:
    return f"{status.st_dev}:{status.st_ino}:{weights_changed}"


def _below(folder: Path) -> dict[str, os.stat_result]:
    """Everything in a folder and below it, by its path from there; no link is followed. What may not be listed, or lies
    deeper than can be merged, is left out: who opens it is told why.
    """
    found: dict[str, os.stat_result] = {}
    left = [("", 0)]
    while left:
        inside, level = left.pop()
        try:
            with os.scandir(folder / inside) as entries:
                listed = {f"{inside}{entry.name}": entry.stat(follow_symlinks=False) for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError:
            continue
        found |= listed
        if level < MOST_LEVELS:
            left += [(f"{name}/", level + 1) for name, status in listed.items() if stat.S_ISDIR(status.st_mode)]
    return found
