"""The destination of a pull, and the workshop beside it where the next version is put together.

    DEST/              a version, whole; other programs read it
    .DEST.partial/     the workshop
        lock           one pull at a time
        journal        which pieces are there, and of what they are pieces
        new/           the folder to be

A finished `new/` takes DEST's place in one step: it is renamed, or changes places with the DEST that is there
(renameat2, RENAME_EXCHANGE). So DEST is one whole version at every moment, and who has its files open, or has it as
the current folder, goes on reading the old one until the workshop is cleared. A killed pull leaves its workshop,
and the next one of the same version goes on there. Nothing of it is believed: the sha256 of every file decides.
"""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from daemon.disk import durable
from daemon.errors import DaemonError, Reason
from daemon.layout import MANIFEST
from daemon.manifest import FileEntry
from daemon.pull.foreign_manifest import ForeignManifest, parents
from projector.text import listed, shown

CANNOT_EXCHANGE = (*durable.NO_RENAMEAT2, errno.EXDEV)  # the last: a folder out of a container's image
MANIFEST_BYTES = 16 << 20


class Target:
    """A destination that this process alone fills, from `with` on. Raises DaemonError where it must not be touched."""

    def __init__(self, dest: Path) -> None:
        """`dest` may be a link: then what it names is filled, and the link stays."""
        self.dest = Path(os.path.realpath(dest))
        self.workshop = self.dest.with_name(f".{self.dest.name}.partial")
        self.new = self.workshop / "new"
        self.keep = False  # the workshop, for a later call
        self._journal = self.workshop / "journal"

    def __enter__(self) -> "Target":
        if not self.dest.name or self.dest.is_mount():
            raise DaemonError(
                Reason.PULL, f"{self.dest} cannot be replaced: it is a mount point", "name a folder inside of it"
            )
        self.current()
        self._lock = self._locked()
        self.keep = self._journal.exists()  # a call that comes to nothing costs no earlier one its pieces
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self.keep:
                durable.remove(self.workshop)
        finally:
            os.close(self._lock)

    def current(self) -> ForeignManifest | None:
        """The version in place, or None where there is nothing yet. DaemonError where something else is there."""
        if not self.dest.exists():
            return None
        names = os.listdir(self.dest) if self.dest.is_dir() else None
        if names == []:
            return None
        hint = "name a folder that does not exist, is empty, or was made by an earlier pull"
        if names is None or MANIFEST not in names:
            raise DaemonError(Reason.PULL, f"{shown(str(self.dest))} is there already", hint)
        try:
            with (self.dest / MANIFEST).open("rb") as file:
                manifest = ForeignManifest.read(file.read(MANIFEST_BYTES))
        except ValueError as error:
            what = f"{shown(str(self.dest))} is there already, and its {MANIFEST} is not a version's: {error}"
            raise DaemonError(Reason.PULL, what, hint) from error
        folders = {folder for name in manifest.files for folder in parents(name)}
        if strange := sorted(set(self._below()) - {MANIFEST, *manifest.files, *folders}):
            what = f"{shown(str(self.dest))} also holds what no pull put there: {listed(strange)}"
            raise DaemonError(Reason.PULL, what, "the whole folder is replaced: move these away first")
        return manifest

    def is_whole(self, manifest: ForeignManifest, files: Sequence[FileEntry]) -> bool:
        """True where that version is in place, with these of its files and no others, every byte of them read again."""
        current = self.current()
        if current is None or current.text != manifest.text:
            return False
        found = {name: path for name, path in self._below().items() if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in found.items()}
        if sizes != {MANIFEST: len(manifest.text), **{file.name: file.size for file in files}}:
            return False  # without reading any
        return all(_sha256(found[file.name]) == file.sha256 for file in files)

    def _below(self) -> dict[str, Path]:
        """Everything in DEST, by its path from there."""
        return {path.relative_to(self.dest).as_posix(): path for path in self.dest.rglob("*")}

    def begin(self, key: str, manifest: ForeignManifest) -> dict[str, set[int]]:
        """Prepares `new/` for what `key` names. Returns, by file, the offsets of the pieces that are there already."""
        self.keep = False
        there = self._pieces(key)
        stray = self.new / MANIFEST
        if there is None or (stray.exists() and stray.read_bytes() != manifest.text):  # it was swapped out of DEST
            there = {}
            durable.remove(self._journal)  # first: without it nothing in the folder counts
            durable.remove(self.new)
            durable.write_file(self._journal, _line(key))
        durable.make_folder(self.new)
        durable.remove(stray)
        return there

    def open(self, file: FileEntry) -> tuple[int, bool]:
        """The file of `new/` to write pieces into, as a descriptor that the caller closes, and whether it was there."""
        path = self._place(file)
        with suppress(FileNotFoundError):
            if (found := path.lstat()).st_size == file.size and found.st_nlink == 1:  # a link's bytes are DEST's too
                return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW), True
        durable.remove(path)
        return durable.create(path, file.size), False

    def reuse(self, file: FileEntry, current: ForeignManifest | None) -> int | None:
        """Takes a file over from the version in place, if it has one of that content; a descriptor to check it by."""
        same = [old for old in (current.files if current else {}).values() if old.sha256 == file.sha256]
        if not same:
            return None
        path = self._place(file)
        durable.remove(path)
        try:
            durable.link_or_copy(self.dest / same[0].name, path)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            return None  # somebody removed it, or put a link there

    def note(self, file: FileEntry, offset: int) -> None:
        """Remembers that the piece at `offset` is there."""
        with self._journal.open("ab", buffering=0) as journal:
            journal.write(_line([file.name, offset]))  # one write: whole or not at all, but for a power failure

    def put_in_place(self, manifest: ForeignManifest | None) -> None:
        """Makes `new/`, whose files are synced, what DEST is: at once and durably."""
        if manifest is not None:
            durable.write_file(self.new / MANIFEST, manifest.text)
        for folder in [*(path for path in self.new.rglob("*") if path.is_dir()), self.new]:
            durable.sync_folder(folder)
        if self.current() is None:
            durable.rename(self.new, self.dest)
            return
        try:
            durable.exchange(self.new, self.dest)
        except OSError as error:
            if error.errno not in CANNOT_EXCHANGE:
                raise
            self.keep = True
            raise DaemonError(
                Reason.PULL,
                f"the file system of {shown(str(self.dest))} cannot exchange two folders in one step",
                "remove DEST and call again (what was fetched is kept), or pull each version into a folder of its own",
            ) from error

    def _place(self, file: FileEntry) -> Path:
        """Where a file is put together; the folders that it lies in are made."""
        path = self.new / file.name
        durable.make_folder(path.parent)
        return path

    def _pieces(self, key: str) -> dict[str, set[int]] | None:
        """What the journal has, or None where it is not of `key`."""
        found: dict[str, set[int]] = {}
        try:
            first, *rest = self._journal.read_bytes().splitlines(keepends=True)
        except (FileNotFoundError, ValueError):
            return None
        if first != _line(key) or not self.new.is_dir():
            return None
        for line in rest:
            with suppress(ValueError, TypeError):  # the last one may be cut
                name, offset = json.loads(line)
                found.setdefault(name, set()).add(offset)
        return found

    def _locked(self) -> int:
        path = self.workshop / "lock"
        busy = DaemonError(
            Reason.PULL,
            f"another pull is filling {shown(str(self.dest))}",
            "wait until it is done, or name another folder",
        )
        made = [folder for folder in self.dest.parents if not folder.exists()]
        durable.make_folder(self.workshop)
        for folder in made:
            durable.sync_folder(folder.parent)
        try:
            held = durable.lock(path)
        except (BlockingIOError, FileNotFoundError):  # the latter: it was cleared away between the two calls
            raise busy from None
        # Whoever held it may have cleared the workshop after we opened the file: then our lock is on nothing.
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(held)):
            os.close(held)
            raise busy
        return held


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
