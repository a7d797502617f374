"""One file that comes over HTTP, on its way to the disk."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from daemon.arrivals.inbox import TEMPORARY
from daemon.disk import durable
from daemon.disk.durable import Folder
from daemon.errors import NotUploaded, Reason
from projector.text import shown

LONGEST_NAME = 200  # leaves room for what is added while the file comes
RESERVE_BYTES = 64 << 20  # always left free: the daemon itself needs to write
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Stored:
    """One file that came whole; `sha256` in hex."""

    name: str
    size_bytes: int
    sha256: str


class Incoming:
    """A file of `expert` that is coming: `open`, `write` its bytes in order, `sync`, and `close` or `remove`.

    size: in bytes, None where it is not known beforehand. check: raises NotUploaded where so many bytes more are too
    many.
    """

    def __init__(self, expert: str, name: str, folder: Folder, size: int | None, check: Callable[[int], None]) -> None:
        self.expert = expert
        self.name = name
        self.part = f".{name}.part"  # what it is called in `folder` while it comes
        self.size = size
        self.done = 0
        self._digest = hashlib.sha256()
        self._folder = folder
        self._fd: int | None = None
        self._check = check

    def open(self) -> None:
        """Makes the file, its space reserved where its size is known. Raises NotUploaded, OSError where the disk is
        full.
        """
        self._check(self.size or 0)
        _check_space(self._folder, self.size or 0)
        self._fd = self._folder.create(self.part, self.size)

    def write(self, data: bytes) -> None:
        """Takes the next bytes. Raises NotUploaded where they are too many, OSError where the disk is full."""
        assert self._fd is not None, "open first"
        self._check(len(data))
        _check_space(self._folder, 0)
        durable.write_at(self._fd, data, self.done)
        self._digest.update(data)
        self.done += len(data)

    def stored(self) -> Stored:
        """What has come."""
        return Stored(self.name, self.done, self._digest.hexdigest())

    def sync(self) -> None:
        """Makes what came durable. Raises SyncFailed, or OSError where the disk is full."""
        assert self._fd is not None, "open first"
        durable.sync(self._fd)

    def close(self) -> None:
        """Lets go of the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def remove(self) -> None:
        """Lets go of the file, and removes it where it is still here."""
        self.close()
        self._folder.remove(self.part)


def check_name(name: str) -> None:
    """Raises NotUploaded where that cannot be the name of an expert or of a file of one."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME or TEMPORARY.fullmatch(name):
        raise NotUploaded(
            Reason.UPLOAD_NAME,
            f"{shown(name)} cannot be the name of an upload",
            f"letters, digits and . _ - only, {LONGEST_NAME} at the most, no leading dot, nothing like .tmp or .part",
        )


def _check_space(folder: Folder, size: int) -> None:
    if shutil.disk_usage(folder.fd).free < size + RESERVE_BYTES:
        raise NotUploaded(
            Reason.UPLOAD_SPACE,
            "there is not enough free space for it",
            "make room on the home's disk, or lower the retention",
        )
