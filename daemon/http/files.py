"""The manifest and the files of one published version.

Two rules make every body the bytes of exactly one committed version:

- a version exists when the REGISTRY has its row: a folder without a row is not there, and manifest.json must have the
  digest that the row names;
- a file exists when that MANIFEST lists it: a name from the network is looked up, never joined to a path.
"""

import os
import stat
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from daemon.disk.durable import is_short
from daemon.http.answers import Problem
from daemon.layout import MANIFEST, Home
from daemon.manifest import FileEntry, Manifest
from daemon.notation import called
from registry.reader import Reader
from registry.records import Head, Version

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a FIFO must not hang us


class Published:
    """The published versions of one home."""

    def __init__(self, home: Home, reader: Reader) -> None:
        self.home = home
        self.reader = reader

    def head(self, name: str) -> Head:
        """The head with that name. Problem 404."""
        head = self.reader.head(name)
        if head is None:
            raise Problem(404, "unknown_head", "there is no such head", "GET /v1/heads lists the heads")
        return head

    def row(self, head: Head, n: int) -> Version:
        """The row of a version, whether or not its files are still there. Problem 404."""
        version = self.reader.version(head.name, n)
        if version is None:
            raise Problem(
                404,
                "unknown_version",
                f"there is no version {called(head.name, n)}",
                f"{called(head.name, head.live)} is live",
            )
        return version

    def version(self, head: Head, n: int) -> Version:
        """The row of a version whose files should be there. Problem 404, or 410 when retention removed it."""
        version = self.row(head, n)
        if version.collected:
            raise _gone(head, n)
        return version

    def manifest(self, head: Head, version: Version) -> Manifest:
        """The checked manifest. Problem 410 when it was just collected, 500 when it is damaged."""
        try:
            return _manifest(self.home.version(head.name, version.number), version.manifest_sha256)
        except FileNotFoundError:
            raise self.missing(head, version.number) from None
        except (OSError, ValueError) as error:
            raise _busy() if is_short(error) else damaged(head, version.number, MANIFEST) from error

    def open(self, head: Head, version: Version, entry: FileEntry) -> int:
        """A descriptor of one listed file; the caller closes it. Problem 410 or 500 as for `manifest`."""
        try:
            descriptor = _open(self.home.version(head.name, version.number), entry.name)
        except FileNotFoundError:
            raise self.missing(head, version.number) from None
        except OSError as error:  # among them ELOOP: someone put a symbolic link there
            raise _busy() if is_short(error) else damaged(head, version.number, entry.name) from error
        if os.fstat(descriptor).st_size != entry.size:
            os.close(descriptor)
            raise damaged(head, version.number, entry.name)
        return descriptor

    def read(self, head: Head, version: Version, entry: FileEntry, most: int) -> bytes:
        """The first `most` bytes of one listed file. OSError, and Problem as for `open`."""
        with os.fdopen(self.open(head, version, entry), "rb") as file:
            return file.read(most)

    def missing(self, head: Head, n: int) -> Problem:
        """What to answer where a file of a version that should be there is not."""
        # Retention touches neither the live version nor the newest. For any other one, files that vanished after the
        # row was read mean that it is being collected right now. The head is read again: it may have moved on.
        now = self.head(head.name)
        return damaged(now, n, "a file") if n in (now.live, now.newest) else _gone(now, n)


@lru_cache(maxsize=256)
def _manifest(folder: Path, sha256: str) -> Manifest:
    """Reads, checks and remembers a manifest, with the files in it that can be asked for. OSError, or ValueError when
    it is damaged.
    """
    with open(_open(folder, MANIFEST), "rb") as file:
        found = Manifest.read(file.read(), sha256)
    return replace(found, files={name: entry for name, entry in found.files.items() if _stays_below(name)})


def _stays_below(name: str) -> bool:
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _open(folder: Path, name: str) -> int:
    """Opens a regular file inside `folder`, or in a folder below it, following no symbolic link. OSError."""
    *above, last = name.split("/")
    directory = os.open(folder, _FOLDER)
    try:
        for part in above:
            below = os.open(part, _FOLDER, dir_fd=directory)
            os.close(directory)
            directory = below
        descriptor = os.open(last, _FILE, dir_fd=directory)
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{name} is not a regular file")
    return descriptor


def _gone(head: Head, n: int) -> Problem:
    return Problem(
        410,
        "collected",
        f"{called(head.name, n)} was removed by retention",
        f"the live version is {called(head.name, head.live)}: GET /v1/heads/{head.name}/latest",
    )


def _busy() -> Problem:
    return Problem(503, "busy", "too many files are open", "try again", {"Retry-After": "5"})


def damaged(head: Head, n: int, what: str) -> Problem:
    """What to answer where `what` of a version cannot be used."""
    return Problem(
        500,
        "damaged",
        f"{called(head.name, n)}: {what} is missing or not what was published",
        "run `mainstem verify` on the server, which says how to mend it",
    )
