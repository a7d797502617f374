"""Experts that are sent over HTTP: written where only the daemon writes, checked, moved into the inbox when whole.

    state/uploads/NAME/FILE            whole, waiting for the rest of its folder
    state/uploads/NAME/.FILE.part      coming

An expert of one file enters the inbox with its last byte, a folder when its sender says that it is complete, one that
is pushed in commits (`pushes.py`) once no other commit follows. But for what was committed nothing in state/uploads
outlives the process: who was cut off begins again. Knows nothing of HTTP; safe to call from any thread.
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote
from threading import Lock

import structlog

from daemon.arrivals.pushes import COMMITTED, LAID_OUT, Push, lay_out
from daemon.arrivals.receiving import Incoming, Stored, check_name
from daemon.config import Http, taking_effect
from daemon.disk import durable
from daemon.disk.durable import Folder
from daemon.errors import BadConfig, NotUploaded, Reason, UploadsBusy
from daemon.layout import Home
from projector.text import listed, shown

AT_ONCE = 8  # files that come at the same time; a client of the Hub sends five
MOST_OPEN = 32  # experts of which something has come, but not all
MOST_FILES = 1000  # in one folder
STALE_SECONDS = 6 * 3600.0
FAILING_SECONDS = 60.0  # so long is told that an upload could not be stored: behind a proxy none may come any more
SHORTEST_TOKEN = 16

Count = Callable[[str, int], None]
"""Hears of the end of each file: "stored", "refused" or "broken", and how many bytes were stored."""


@dataclass
class _Upload:
    """What has come of one expert; `single`: it is one file. `push`: what its commits made of it, None where it comes
    without any. `laid_out`: it waits for its name in the inbox to be free.
    """

    folder: Folder
    single: bool
    push: Push | None = None
    laid_out: bool = False
    files: dict[str, Stored] = field(default_factory=dict)
    coming: dict[str, Incoming] = field(default_factory=dict)
    touched: float = field(default_factory=time.monotonic)

    def size_bytes(self) -> int:
        """All that is there of it."""
        whole = sum(file.size_bytes for file in list(self.files.values()))
        return whole + sum(file.done for file in list(self.coming.values()))


class Uploads:
    """All uploads into one home. `token`: what a sender must know; None where nothing is taken. `stall_seconds`: over
    how long a sender's pace is measured.
    """

    def __init__(
        self,
        home: Home,
        settings: Http,
        count: Count = lambda *_: None,
        failed: Callable[[], object] = lambda: None,
    ) -> None:
        """`failed`: called where the disk failed, so that somebody may `tend` at once.

        Raises BadConfig where the token cannot be read or is easily guessed; logs where others may read it too.
        """
        self.stall_seconds = settings.stall_seconds
        self._home = home
        self.adopt(settings, write_token(home, settings))
        self._count = count
        self._tell = failed
        self._lock = Lock()
        self._open: dict[str, _Upload] = {}
        self._failed: OSError | None = None
        self._failing: tuple[float, str] | None = None  # when, and why

    def adopt(self, settings: Http, token: str | None) -> None:
        """Asks for this token from here on, and takes experts of the size in the settings."""
        self.token = token
        self._limit = int(settings.upload_bytes)
        self.quiet_seconds = settings.push_quiet_seconds
        if settings.write_token_file:
            _warn_of_readers(self._home.root / settings.write_token_file)

    @property
    def failing(self) -> str | None:
        """Why the last upload could not be stored; None where it could, or it was FAILING_SECONDS ago."""
        when, why = self._failing or (float("-inf"), None)
        return why if time.monotonic() - when < FAILING_SECONDS else None

    def begin(self, expert: str, file: str | None, size: int | None, *, pushed: bool = False) -> Incoming:
        """A file to write to: the expert itself, or `file` of its folder; of one that is `pushed`, a file for a commit
        to name. `size` in bytes where it is known.

        Raises NotUploaded, or OSError where the disk is full.
        """
        check_name(expert)
        check_name(file or expert)
        if file is None and not expert.endswith(".safetensors"):
            raise NotUploaded(
                Reason.UPLOAD_NAME,
                "an expert of one file is a .safetensors file",
                "send a folder file by file, to .../files/{file}, and commit it",
            )
        with self._lock, self._watched():
            upload = self._joined(expert, file, pushed)
            incoming = Incoming(expert, file or expert, upload.folder, size, partial(self._check_size, upload))
            upload.coming[incoming.name] = incoming
        try:
            with self._watched():
                incoming.open()
        except BaseException:
            self.drop(incoming, "refused")
            raise
        return incoming

    def finish(self, incoming: Incoming, digests: set[str]) -> Stored:
        """Keeps a file that has come whole, durably; an expert of one file is in the inbox then.

        `digests`: every sha256 that its sender named, in hex. Raises NotUploaded, SyncFailed, or OSError where the disk
        is full; then it must still be dropped.
        """
        stored = incoming.stored()
        if incoming.size not in (None, incoming.done):
            raise NotUploaded(Reason.UPLOAD_SIZE, f"{incoming.done} of {incoming.size} bytes came", "send it again")
        if digests - {stored.sha256}:
            raise NotUploaded(Reason.UPLOAD_DIGEST, f"what came has another sha256: {stored.sha256}", "send it again")
        with self._watched():
            incoming.sync()
            with self._lock:
                upload = self._open[incoming.expert]
                if not upload.single:
                    upload.files.pop(incoming.name, None)  # where this fails, neither is known to be there
                upload.folder.move(incoming.part, incoming.name)
                if upload.single:
                    self._enter(upload.folder, incoming.name)
                    self._remove(incoming.expert)
                else:
                    upload.files[incoming.name] = stored
                    del upload.coming[incoming.name]
                    upload.touched = time.monotonic()
        incoming.close()
        self._count("stored", stored.size_bytes)
        return stored

    def drop(self, incoming: Incoming, outcome: str = "broken") -> None:
        """Removes a file that did not come whole, and its upload where nothing is left of it."""
        with self._lock:
            upload = self._open.get(incoming.expert)
            if upload is None or upload.coming.get(incoming.name) is not incoming:  # what failed came after its end
                incoming.close()
            else:
                self._drop(incoming, upload)
        self._count(outcome, 0)

    def commit(self, expert: str, wanted: Mapping[str, str] | None) -> list[Stored]:
        """Puts a folder into the inbox: the files that came. `wanted`: the sha256 of each by name, where it was told.

        Raises NotUploaded, SyncFailed, or OSError where the disk is full.
        """
        with self._lock, self._watched():
            upload = self._idle(expert)
            found = {file.name: file.sha256 for file in upload.files.values()}
            if wanted is not None and wanted != found:
                raise _other_files(expert, wanted, found)
            upload.folder.sync()
            with Folder(self._home.uploads) as uploads:
                try:
                    self._enter(uploads, expert)
                finally:
                    if not uploads.holds(expert):  # it is the inbox's now, whatever the disk says of its name there
                        del self._open[expert]
                        upload.folder.close()
        return sorted(upload.files.values(), key=lambda file: file.name)

    def abandon(self, expert: str) -> None:
        """Removes what has come of a folder. Raises NotUploaded where there is none, or some of it is still coming."""
        with self._lock:
            self._idle(expert)
            self._remove(expert)

    def pushed(self, expert: str) -> Push | None:
        """What the commits so far made of an expert that is being pushed."""
        upload = self._open.get(expert)
        return upload.push if upload else None

    def touch(self, expert: str) -> None:
        """More of what is being pushed is about to come."""
        if upload := self._open.get(expert):
            upload.touched = time.monotonic()

    def has(self, expert: str, file: str) -> Stored | None:
        """A file that came whole, for an expert that is being pushed."""
        upload = self._open.get(expert)
        return upload.files.get(file) if upload and upload.push is not None else None

    def record(
        self,
        expert: str,
        added: Mapping[str, str],
        removed: Collection[str],
        summary: str,
        parent: str | None = None,
    ) -> tuple[Push, bool]:
        """One commit: `added` has, by its path, the file that came, `removed` the paths of files, and of folders with a
        slash behind them; `parent` is the commit that it must follow, where it has to. What has become of it, and
        whether it is in the inbox by now.

        Raises NotUploaded, SyncFailed, or OSError where the disk is full.
        """
        with self._lock, self._watched():
            upload = self._open.get(expert)
            if upload is None and not added:  # a commit of what does not count
                return Push(), False
            if upload is None or upload.push is None:
                raise NotUploaded(Reason.UPLOAD_MISSING, f"nothing of {shown(expert)} has come", "push its weights")
            if upload.laid_out:
                raise _taken(expert, "waits for the one before it in the inbox")
            if parent and parent != upload.push.commit:
                what = f"another commit of {shown(expert)} came after {shown(parent)}: {upload.push.commit}"
                hint = "look at what is there now, then commit onto that; or push to a name of your own"
                raise NotUploaded(Reason.UPLOAD_TAKEN, what, hint)
            if missing := [path for path, file in added.items() if file not in upload.files]:
                what = f"what these are has not come: {listed(missing)}"
                raise NotUploaded(Reason.UPLOAD_UNFINISHED, what, "push them again; a restart forgets them")
            stored = {path: upload.files[file] for path, file in added.items()}
            before, after = upload.push, upload.push.changed(stored, removed, summary)
            durable.replace_file(self._home.uploads / expert / COMMITTED, after.to_json())
            upload.push = after
            upload.touched = time.monotonic()
            still = {one.name for one in upload.push.paths.values()}
            self._forget(upload, {one.name for one in before.paths.values()} - still)
            push = upload.push
            return push, push.is_ready and push.is_expert and self._place(expert, upload)

    def forget(self, expert: str, files: Collection[str]) -> None:
        """Removes files that came for a commit that failed."""
        with self._lock:
            upload = self._open.get(expert)
            if self._failed:  # it is not known which commit is on the disk, and this process ends
                return
            if upload and upload.push is not None and not upload.laid_out:
                self._forget(upload, set(files) - {one.name for one in upload.push.paths.values()})
                if not upload.files and not upload.coming:
                    self._remove(expert)

    def resume(self) -> None:
        """Goes on with what was committed before this process began. Call it once, before anything comes."""
        if not self._home.uploads.is_dir():
            return
        for path in sorted(self._home.uploads.iterdir()):
            laid_out = (path / LAID_OUT).exists()
            if not laid_out and not (path / COMMITTED).exists():
                durable.remove(path)
                continue
            push = Push.from_json((path / (LAID_OUT if laid_out else COMMITTED)).read_bytes())
            files = {one.name: one for one in push.paths.values()}
            if laid_out and not (path / path.name).exists():  # it is in the inbox
                durable.remove(path)
                continue
            upload = _Upload(Folder(path), False, push, laid_out, files)
            for name in [] if laid_out else {one.name for one in path.iterdir()} - {*files, COMMITTED}:
                upload.folder.remove(name)
            self._open[path.name] = upload

    def came(self, expert: str) -> list[Stored] | None:
        """The files of it that came whole, while it is being sent; None where it is not."""
        with self._lock:
            upload = self._open.get(expert)
            if upload and upload.push is not None:  # its files have names of their own until it is laid out
                return [replace(stored, name=path) for path, stored in sorted(upload.push.paths.items())]
            return None if upload is None else sorted(upload.files.values(), key=lambda file: file.name)

    def tend(self) -> None:
        """Removes what nobody has added to for STALE_SECONDS, and lets enter what was pushed and is at rest. Raises
        OSError where the disk failed an upload.
        """
        if self._failed:
            raise self._failed
        with self._lock:
            for expert, upload in list(self._open.items()):
                quiet = time.monotonic() - upload.touched
                push = upload.push
                if upload.coming:
                    continue
                if push and push.is_expert and quiet >= push.quiet_seconds(self.quiet_seconds):
                    with suppress(OSError), self._watched():  # an inbox that is gone, a full disk: it waits
                        self._place(expert, upload)
                elif quiet >= STALE_SECONDS:
                    self._remove(expert)

    def _place(self, expert: str, upload: _Upload) -> bool:
        """Lets what was pushed enter the inbox, where its name is free there; whether it was."""
        assert upload.push is not None
        if os.path.lexists(self._home.inbox / expert):
            return False
        if not upload.laid_out:
            lay_out(self._home.uploads / expert, expert, upload.push)
            upload.laid_out = True
        try:
            self._enter(upload.folder, expert)
        except NotUploaded:  # somebody was faster
            return False
        self._remove(expert)
        size = sum(one.size_bytes for one in upload.push.paths.values())
        files, commit = len(upload.push.paths), upload.push.commit
        structlog.get_logger().info("uploaded", drop=expert, size_bytes=size, files=files, commit=commit)
        return True

    def _forget(self, upload: _Upload, files: Collection[str]) -> None:
        for file in files:
            if upload.files.pop(file, None):
                upload.folder.remove(file)

    def _drop(self, incoming: Incoming, upload: _Upload) -> None:
        incoming.remove()
        del upload.coming[incoming.name]
        upload.touched = time.monotonic()
        if incoming.name not in upload.files:
            upload.folder.remove(incoming.name)
        if not upload.files and not upload.coming and not (upload.push and upload.push.paths):
            self._remove(incoming.expert)

    def _joined(self, expert: str, file: str | None, pushed: bool) -> _Upload:
        """The upload that the file belongs to, a new one where there is none."""
        upload = self._open.get(expert)
        if upload is None and not pushed and os.path.lexists(self._home.inbox / expert):
            raise _taken(expert, "lies in the inbox")
        if upload and (file is None or upload.single or file in upload.coming or pushed is (upload.push is None)):
            raise _taken(expert, "is being sent")
        if upload and upload.laid_out:
            raise _taken(expert, "waits for the one before it in the inbox")
        if upload and len(upload.files) + len(upload.coming) >= MOST_FILES:
            raise _limit(f"a folder may have {MOST_FILES} files")
        if upload is None and len(self._open) >= MOST_OPEN:
            raise _limit(f"{MOST_OPEN} uploads have been begun and not finished")
        if sum(len(one.coming) for one in self._open.values()) >= AT_ONCE:
            what, hint = f"{AT_ONCE} files are being sent already", "try again when one of them has ended"
            raise UploadsBusy(Reason.UPLOAD_LIMIT, what, hint)
        if upload is None:
            durable.make_folder(self._home.uploads)
            with Folder(self._home.uploads) as uploads:
                uploads.remove(expert)
                push = Push() if pushed else None
                upload = self._open[expert] = _Upload(uploads.make(expert), file is None, push)
        return upload

    def _check_size(self, upload: _Upload, more: int) -> None:
        if upload.size_bytes() + more > self._limit:
            raise NotUploaded(
                Reason.UPLOAD_SIZE,
                f"an expert may have {self._limit} bytes at the most",
                taking_effect("a higher http.upload_bytes would take it"),
            )

    def _idle(self, expert: str) -> _Upload:
        upload = self._open.get(expert)
        if upload is None or upload.push is not None:
            raise NotUploaded(
                Reason.UPLOAD_MISSING,
                f"no upload of {shown(expert)} is open",
                "PUT its files first; a restart forgets them",
            )
        if upload.coming:
            raise NotUploaded(
                Reason.UPLOAD_UNFINISHED, f"a file of {expert} is still coming", "wait for its answer, or break it off"
            )
        return upload

    def _enter(self, folder: Folder, expert: str) -> None:
        """Moves what has the expert's name out of that folder into the inbox."""
        try:
            with Folder(self._home.inbox, follow=True) as inbox:  # a link that the home's owner made, and no one else
                folder.move_new(expert, inbox)
        except FileExistsError:
            raise _taken(expert, "came into the inbox meanwhile") from None

    def _remove(self, expert: str) -> None:
        self._open.pop(expert).folder.close()
        with suppress(FileNotFoundError), Folder(self._home.uploads) as uploads:
            uploads.remove(expert)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Remembers what the disk did. One that fails ends the daemon (`tend`), whoever it befell."""
        try:
            yield
        except OSError as error:
            self._failing = time.monotonic(), error.strerror or type(error).__name__
            self._failed = self._failed or durable.failed_sync(error) or (error if error.errno == errno.EIO else None)
            if self._failed:
                self._tell()
            raise
        self._failing = None


def write_token(home: Home, settings: Http) -> str | None:
    """The token that uploads must bring, None where they are off. Raises BadConfig where it is no good one."""
    token = settings.write_token.get_secret_value()
    if settings.write_token_file:
        if token:
            raise BadConfig("http.write_token and http.write_token_file are both set", "leave one of them out")
        path = home.root / settings.write_token_file
        try:
            token = path.read_text().strip()
        except (OSError, ValueError) as error:
            raise BadConfig(f"http.write_token_file {path}: {error}", "put the token into that file") from None
    elif not token:
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise BadConfig(
            f"the write token must be {SHORTEST_TOKEN} or more ASCII characters without spaces",
            "make one: openssl rand -hex 32",
        )
    return token


def _warn_of_readers(path: Path) -> None:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:  # it was there a moment ago, when it was read
        return
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        structlog.get_logger().warning(
            "others than its owner may read the write token, and then upload",
            file=str(path),
            mode=f"{mode:04o}",
            hint=f"chmod 600 {quote(str(path))}",
        )


def _other_files(expert: str, wanted: Mapping[str, str], found: Mapping[str, str]) -> NotUploaded:
    """What to raise where other files came than a commit names."""
    kinds = {
        "missing": [name for name in sorted(wanted) if name not in found],
        "different": [name for name in sorted(wanted) if name in found and wanted[name] != found[name]],
        "sent before, and not named": [name for name in sorted(found) if name not in wanted],
    }
    what = "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)
    hint = "send what is missing or different, then commit again"
    if kinds["sent before, and not named"]:
        anew = f"DELETE /v1/experts/{expert} gives up all that came under this name, whoever sent it; then send it anew"
        hint = f"{anew}, or at once under another name"
    return NotUploaded(Reason.UPLOAD_UNFINISHED, what, hint)


def _taken(expert: str, where: str) -> NotUploaded:
    return NotUploaded(
        Reason.UPLOAD_TAKEN, f"{expert} {where}", "choose another name, or wait until the daemon has taken that one"
    )


def _limit(what: str) -> NotUploaded:
    return NotUploaded(Reason.UPLOAD_LIMIT, what, "try again when one of them has ended")
