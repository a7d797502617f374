"""What is wrong with a home, as far as can be seen at once: nothing is hashed, and nothing is opened that is large.

The daemon notes what only it knows (`Health.note`); all else is looked for, from inside it and from beside it alike.
"""

import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

from daemon.arrivals.receiving import RESERVE_BYTES
from daemon.arrivals.stuck import stays_hint
from daemon.disk import durable
from daemon.layout import MANIFEST, Home
from daemon.manifest import Manifest
from daemon.notation import called
from projector.text import listed
from registry.errors import Busy, RegistryError
from registry.reader import Reader
from registry.records import Head, Status

MAKE_ROOM = "make room on its disk: `mainstem gc`; `mainstem prune --dry-run` says what else may go"
STUCK = timedelta(seconds=10)  # what is decided is moved out of the inbox at once


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong: a word for it, what it is, and what to do. No text names a path outside the home."""

    reason: str
    text: str
    hint: str


class Health:
    """One home's troubles. Safe to use from any thread."""

    def __init__(self, home: Home, told: Callable[[Sequence[Trouble]], None] = lambda _: None) -> None:
        """`told` hears of all that is noted, where that changes."""
        self._home = home
        self._told = told
        self._notes: Mapping[str, Trouble] = {}

    def note(self, trouble: Trouble) -> None:
        """Something is wrong, until it is cleared."""
        self._set({**self._notes, trouble.reason: trouble})

    def clear(self, reason: str) -> None:
        """What was noted under that word is over."""
        self._set({word: trouble for word, trouble in self._notes.items() if word != reason})

    def _set(self, notes: Mapping[str, Trouble]) -> None:
        if notes != self._notes:
            self._notes = notes
            self._told(list(notes.values()))

    def troubles(self, reader: Reader, *, beside: bool = False) -> list[Trouble]:
        """All that is wrong now. `beside`: this process does not merge; somebody else should."""
        notes = self._notes  # looked at once: the daemon may note something meanwhile
        found = [*notes.values(), *self._in_the_registry(reader)]
        try:
            return found + self._on_the_disk(notes, beside)
        except OSError as error:
            why = f"the home cannot be looked at: {error.strerror}"
            return [*found, Trouble("damaged", why, "look at its disk, its mount and its owner")]

    def _on_the_disk(self, notes: Mapping[str, Trouble], beside: bool) -> list[Trouble]:
        found = []
        if "no_inbox" not in notes and not self._home.inbox.is_dir():
            found.append(Trouble("no_inbox", "the inbox is gone", "make the folder `inbox` in the home again"))
        if "disk_full" not in notes and _free(self._home.root) < RESERVE_BYTES:
            found.append(Trouble("disk_full", f"less than {RESERVE_BYTES >> 20} MiB of disk are free", MAKE_ROOM))
        if beside and not durable.is_locked(self._home.lock):
            found.append(Trouble("no_daemon", "no daemon runs on this home: nothing is merged", "start `mainstem run`"))
        return found

    def _in_the_registry(self, reader: Reader) -> list[Trouble]:
        try:
            both = [(head, n) for head in reader.heads() for n in sorted({head.live, head.newest})]
            found = [trouble for head, n in both if (trouble := self._of_version(reader, head, n))]
            since = datetime.now(UTC) - STUCK
            late = [row for row in reader.unplaced() if row.finished_at and row.finished_at < since]
            # one of which the archive has a copy is in nobody's way
            stuck = [row for row in late if row.status is not Status.MERGED or not self._home.archived(row.id)]
        except RegistryError as error:
            text = "the registry is busy" if isinstance(error, Busy) else "the registry cannot be read"
            return [Trouble("registry", text, error.hint)]
        if stuck:
            text = f"decided, but not to be moved out of the inbox: {listed((row.name for row in stuck), most=3)}"
            found.append(Trouble("stuck", text, stays_hint(self._home, stuck[0])))
        return found

    def _of_version(self, reader: Reader, head: Head, n: int) -> Trouble | None:
        """Of the live one, which is read, and of the newest, which the next one continues from."""
        version = reader.version(head.name, n)
        wrong = self._wrong(head, n, version.manifest_sha256) if version else ["its row"]
        if not wrong or reader.head(head.name) != head:  # it has moved on, and that version may have been collected
            return None
        text = f"{called(head.name, n)}: missing or not what was published: {listed(wrong, most=3)}"
        return Trouble("damaged", text, "`mainstem verify` names all that differ, and where to take it from")

    def _wrong(self, head: Head, n: int, manifest_sha256: str) -> list[str]:
        folder = self._home.version(head.name, n)
        try:
            sizes = _sizes(folder, manifest_sha256)
        except (OSError, ValueError):
            return [MANIFEST]
        return [name for name, size in sizes.items() if _size(folder / name) != size]


def _free(folder: Path) -> float:
    """The free bytes of a disk; as many as one likes where nothing is to be written on it."""
    return float("inf") if os.statvfs(folder).f_flag & os.ST_RDONLY else shutil.disk_usage(folder).free


def _size(path: Path) -> int | None:
    """A regular file's size in bytes, None where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@lru_cache(maxsize=32)
def _sizes(folder: Path, manifest_sha256: str) -> Mapping[str, int]:
    """The size of each file of a version in bytes, its manifest among them.

    OSError or ValueError where the manifest is damaged.
    """
    fd = os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        raw = file.read()
    files = Manifest.read(raw, manifest_sha256).files
    return {MANIFEST: len(raw)} | {name: file.size for name, file in files.items()}
