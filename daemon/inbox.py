"""What lies in the inbox, and which of it has come to rest.

Events are hints, the scan is the truth: an entry counts as settled when its fingerprint (size, time and inode of every
file in it) has not changed for `settle_seconds`, or at once where a folder brings the marker file _READY.
"""

import os
import re
import stat
import time
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

READY_MARKER = "_READY"
TEMPORARY = re.compile(
    r"""
      \..*                                                    # hidden files, rsync's .name.XXXXXX, Syncthing's
    | .*(\.tmp|\.part|\.partial|\.incomplete|\.crdownload|\.download|\.lock|\.swp|~)
    | .*\.tmp[A-Za-z0-9_]{6,8}                                # safetensors' and tempfile's
    | .*\.safetensors\.[A-Za-z0-9]{8}                         # boto's
    | .*_\.gstmp
    | \~syncthing\~.*
    """,
    re.VERBOSE | re.DOTALL,
)

Fingerprint = tuple[object, ...]
Stamp = tuple[int, int, int, int, int]


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
class Scan:
    """The inbox at one moment: what is settled, oldest first, and how many entries still move."""

    settled: list[Drop]
    moving: int


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
        since: dict[str, tuple[Fingerprint, float]] = {}
        with os.scandir(self._path) as listing:
            entries = list(listing)
        for entry in entries:
            if TEMPORARY.fullmatch(entry.name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
                fingerprint, size, ready = _fingerprint(Path(entry.path), status)
                identity = entry_id(Path(entry.path))
            except OSError:  # it went, or a file took its place, just now; or its file system does not know what it is
                continue
            if identity in skip:
                continue
            before = self._since.get(entry.name)
            since[entry.name] = before if before and before[0] == fingerprint else (fingerprint, now)
            rest = now - since[entry.name][1]
            if ready or rest >= self.settle_seconds:
                settled.append(Drop(entry.name, identity, status.st_mtime_ns, size, rest))
        self._since = since
        settled.sort(key=lambda drop: (drop.mtime_ns, drop.name))
        return Scan(settled, len(since) - len(settled))


def stamp(status: os.stat_result) -> Stamp:
    """What changes when a file is written to or replaced: device, inode, size, mtime, ctime."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def entry_id(path: Path) -> str:
    """What stays the same when an entry is moved, or a note is laid beside the weights, and hardly ever comes again.

    Device, inode and the time of the last change to the weights. Raises OSError where there is no such entry.
    """
    status = path.lstat()
    changed = _weights_changed(path) if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
    return f"{status.st_dev}:{status.st_ino}:{changed}"


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


def _fingerprint(path: Path, status: os.stat_result) -> tuple[Fingerprint, int, bool]:
    """(what changes while the entry is written, its size in bytes, whether it carries the ready marker)."""
    if not stat.S_ISDIR(status.st_mode):
        return stamp(status)[:4], status.st_size, False
    try:
        files = sorted(_files(path))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError:  # it may not be read, or cannot be: who opens it is told why
        return stamp(status)[:4], 0, False
    names = {name for name, _ in files}
    return tuple(files), sum(size for _, (_, _, size, _) in files), READY_MARKER in names


def _weights_changed(folder: Path) -> int:
    with suppress(OSError):
        return max((mtime for name, (*_, mtime) in _files(folder) if name.endswith(".safetensors")), default=0)
    return 0


def _files(path: Path) -> list[tuple[str, tuple[int, int, int, int]]]:
    with os.scandir(path) as entries:
        return [(entry.name, stamp(entry.stat(follow_symlinks=False))[:4]) for entry in entries]
