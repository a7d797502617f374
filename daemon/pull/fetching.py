"""The files of one version, in pieces over a few connections, until the sha256 of each is the manifest's.

A piece that breaks off goes on where it stopped, after a pause; a piece that is whole is noted in the journal, and a
later call does not fetch it again. If-Range names the content, so that pieces of two contents never meet in one file.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Event, Lock
from urllib.parse import quote

from daemon.disk import durable
from daemon.errors import DaemonError, Reason
from daemon.manifest import FileEntry
from daemon.pull.client import Connection, Damaged, Origin, Passing
from daemon.pull.foreign_manifest import ForeignManifest, etag
from daemon.pull.target import Target
from projector.text import shown

PIECE_BYTES = 16 << 20
HASH_BYTES = 1 << 20
STALL_SECONDS = 30.0  # without a byte: the piece is asked for again
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0)  # seconds before each further try, while not one byte comes

Report = Callable[[int, int], None]
"""Hears of progress, from several threads, one at a time: the bytes that are there, and the bytes of all files."""


@dataclass
class _File:
    """A file on its way: its descriptor, the offsets of its pieces that are there, and the hash of its beginning."""

    listed: FileEntry
    fd: int
    there: set[int]
    hashed: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    hashing: Lock = field(default_factory=Lock)

    def offsets(self) -> range:
        return range(0, self.listed.size, PIECE_BYTES)

    def length(self, offset: int) -> int:
        """The bytes of the piece at `offset`."""
        return min(PIECE_BYTES, self.listed.size - offset)

    def held(self) -> int:
        """The bytes that are there."""
        return sum(self.length(offset) for offset in self.offsets() if offset in self.there)

    def hash_on(self) -> None:
        """Hashes what is there without a gap; returns at once while another thread does."""
        if not self.hashing.acquire(blocking=False):
            return
        try:
            while self.hashed in self.there and self.hashed < self.listed.size:
                self._hash(self.hashed + self.length(self.hashed))
        finally:
            self.hashing.release()

    def is_right(self) -> bool:
        """True where the whole of it has the manifest's sha256."""
        with self.hashing:
            self._hash(self.listed.size)
        return self.digest.hexdigest() == self.listed.sha256

    def forget(self) -> None:
        """Begins anew."""
        self.there, self.hashed, self.digest = set(), 0, hashlib.sha256()

    def _hash(self, end: int) -> None:
        while self.hashed < end:
            chunk = os.pread(self.fd, min(HASH_BYTES, end - self.hashed), self.hashed)
            if not chunk:  # somebody shortened it
                return
            self.digest.update(chunk)
            self.hashed += len(chunk)


class Fetching:
    """One version's files on their way into a target's workshop."""

    def __init__(
        self,
        origin: Origin,
        folder: str,
        target: Target,
        current: ForeignManifest | None,
        connections: int,
        report: Report,
    ) -> None:
        """`folder` is the path of the files; `current` is the version in place, whose files may serve again."""
        self._origin = origin
        self._folder = folder
        self._target = target
        self._current = current
        self._connections = connections
        self._report = report
        self._stop = Event()
        self._counting = Lock()
        self._done = 0
        self._total = 0
        self.fetched_bytes = 0
        """What came over the network."""

    def fetch(self, files: Sequence[FileEntry], there: dict[str, set[int]]) -> None:
        """Brings the files, whole, right and synced; of the pieces `there`, by file, only those that are missing.

        Raises DaemonError: Passing where the network stayed broken, Gone where the version was removed meanwhile.
        """
        self._total = sum(file.size for file in files)
        self._done = 0
        with ExitStack() as opened:
            coming: list[_File] = []
            for file in files:
                if self._has_again(file):
                    self._count(file.size)
                    continue
                fd, kept = self._target.open(file)
                opened.callback(os.close, fd)
                coming.append(_File(file, fd, there.get(file.name, set()) if kept else set()))
            with durable.flushing([one.fd for one in coming]):
                self._until_right(coming)
            for one in coming:
                durable.sync(one.fd)

    def _until_right(self, files: list[_File]) -> None:
        """Twice at the most: what an earlier call left, or what came, may be wrong; the same again is no accident."""
        self._count(sum(file.held() for file in files))
        wrong = files
        for _ in range(2):
            self._pieces(wrong)
            wrong = [file for file in wrong if not file.is_right()]
            for file in wrong:
                self._count(-file.listed.size)
                file.forget()
        for file in wrong:
            raise _wrong(file.listed.name, "its sha256 is not the manifest's, twice: its bytes change on the way")

    def _has_again(self, file: FileEntry) -> bool:
        """True where the version in place had this very file, and it is in the workshop now."""
        fd = self._target.reuse(file, self._current)
        if fd is None:
            return False
        try:
            return os.fstat(fd).st_size == file.size and _File(file, fd, set()).is_right()
        finally:
            os.close(fd)

    def _pieces(self, files: Iterable[_File]) -> None:
        """Fetches every piece that is missing."""
        missing = deque((file, offset) for file in files for offset in file.offsets() if offset not in file.there)
        connections = [Connection(self._origin, STALL_SECONDS) for _ in range(min(self._connections, len(missing)))]
        if not connections:
            return
        with ThreadPoolExecutor(len(connections), thread_name_prefix="pull") as pool:
            try:
                working = [pool.submit(self._work, connection, missing) for connection in connections]
                ended, _ = wait(working, return_when=FIRST_EXCEPTION)
            finally:  # also where Ctrl-C ends the waiting
                self._stop.set()
                for connection in connections:
                    connection.abort()
        self._stop.clear()
        for one in (*ended, *working):  # first what failed by itself: that knows why
            if (error := one.exception()) is not None:
                raise error

    def _work(self, connection: Connection, missing: "deque[tuple[_File, int]]") -> None:
        with connection:
            while missing and not self._stop.is_set():
                try:
                    file, offset = missing.popleft()
                except IndexError:
                    return
                if self._piece(connection, file, offset):
                    file.there.add(offset)
                    self._target.note(file.listed, offset)
                    file.hash_on()

    def _piece(self, connection: Connection, file: _File, offset: int) -> bool:
        """Fetches one piece, going on where it breaks off; False where it was told to stop."""
        at, end, tries = offset, offset + file.length(offset), 0
        while True:
            before = at
            try:
                for chunk in self._range(connection, file.listed, at, end):
                    durable.write_at(file.fd, chunk, at)
                    at += len(chunk)
                    self._count(len(chunk), fetched=True)
                    if self._stop.is_set():
                        return False
                return True
            except Passing:
                if self._stop.is_set():
                    return False
                tries = tries + 1 if at == before else 0
                if tries > len(PAUSES):
                    raise
                self._stop.wait(PAUSES[max(tries - 1, 0)])

    def _range(self, connection: Connection, file: FileEntry, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to `end` of a file. DaemonError where the server has another file there."""
        path = f"{self._folder}/{quote(file.name)}"
        headers = {"Range": f"bytes={start}-{end - 1}", "If-Range": etag(file.sha256)}
        with connection.get(path, headers) as answer:
            if answer.status not in (200, 206, 416):
                raise connection.problem(path, answer)
            whole = answer.status == 200 and (start, end) == (0, file.size)
            length = answer.headers["Content-Length"] if whole else _total(answer.headers["Content-Range"])
            tag = answer.headers["ETag"]
            if answer.status != 416 and tag != etag(file.sha256):
                raise _wrong(file.name, f"its sha256 is not the manifest's: its ETag is {tag}")
            if answer.status == 200 and not whole:
                raise DaemonError(
                    Reason.PULL,
                    f"{shown(file.name)}: the whole of it came where a piece was asked for",
                    "pull from the mainstem itself: something before it does not pass ranges on",
                )
            if length != str(file.size):
                raise _wrong(file.name, f"it has {length} bytes there, the manifest says {file.size}")
            if not whole and answer.headers["Content-Range"] != f"bytes {start}-{end - 1}/{file.size}":
                raise _wrong(file.name, "the server sends other bytes than the range that was asked for")
            yield from connection.body(path, answer, end - start)

    def _count(self, nbytes: int, fetched: bool = False) -> None:
        with self._counting:
            self._done += nbytes
            self.fetched_bytes += nbytes if fetched else 0
            self._report(self._done, self._total)


def _total(content_range: str | None) -> str:
    """The size of the file that a Content-Range is of."""
    return (content_range or "?").rpartition("/")[2]


def _wrong(name: str, what: str) -> Damaged:
    return Damaged(
        Reason.PULL, f"{shown(name)}: {what}", "try again; if it stays so, run `mainstem verify` on the server"
    )
