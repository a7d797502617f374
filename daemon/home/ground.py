"""What every merge stands on: the base in state/base, and each head's own state.

Both are ours alone, and still both are looked at with every expert: a file that was found sound once is hashed again
where its stamp has changed.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from threading import Thread
from typing import NoReturn, Self
from uuid import uuid4

from daemon.checkpoints.checkpoint import OpenCheckpoint, OpenFile, open_path
from daemon.checkpoints.opening import Stamp, stamp
from daemon.checkpoints.weight_names import WEIGHTS
from daemon.compute.progress import Abandoned
from daemon.disk import durable
from daemon.errors import BadHome, DaemonError, NotYet, Reason
from daemon.home.restoring import again
from daemon.layout import CARD, STATE_FILE, Home, is_weights
from daemon.manifest import FileEntry, Manifest
from daemon.versions.checking import HASH_BYTES, entry, names_below
from daemon.versions.companions import companions
from daemon.versions.heads import HeadTip
from projector.driver.steps import state_specs
from projector.errors import BadFile, ProjectorError
from projector.files.source import Checkpoint, identity
from projector.files.tensorfile import RunningDigest, TensorReader
from projector.spec import Schema
from projector.text import shown
from projector.watch import SILENT, Watch
from registry.reader import Reader
from registry.records import Version


class Base:
    """The base, held open. Close it, or use it as a context manager.

    beside: the files that every version has a copy of, as version 0 has them.

    `check` before an expert is folded and `confirm` after it: together they say that what was read is the base.
    """

    def __init__(self, home: Home, reader: Reader, watch: Watch = SILENT) -> None:
        self._home = home
        self._watch = watch
        self._record = reader.base()
        self._listed = _listed(home, reader)
        self._heads = [head.name for head in reader.heads()]
        try:
            self._opened = open_path(home.base, watch)
        except (DaemonError, ProjectorError) as error:
            others = (name for name, file in self._listed.items() if self._sha256(home.base / name) != file.sha256)
            self._refuse(next(others, WEIGHTS), str(error))
        weights = {file.name for file in self._opened.files}
        self._beside = [name for name in self._listed if name not in weights]
        self.beside = [name for name in self._listed or companions(home.base).files if not is_weights(name)]
        self._hashed: dict[str, tuple[Stamp, str]] = {}

    @property
    def tensors(self) -> Checkpoint:
        return self._opened.tensors

    @property
    def checkpoint(self) -> OpenCheckpoint:
        """Its files. As an expert it is one that changes nothing."""
        return self._opened

    def check(self) -> None:
        """Raises BadHome where a file of it is another than at first; reads what was touched since it was hashed."""
        for name in self._beside:
            self._check_beside(name)
        for file in self._opened.files:
            now = stamp(os.fstat(file.fd))
            if _inode(self._home.base / file.name) != now[:2]:
                raise BadHome(
                    f"state/base/{file.name} was replaced while it was in use",
                    "start again: the first expert then shows whether what is there now is the base",
                )
            known = self._hashed.get(file.name)
            if known and known[0] != now:
                digest = RunningDigest(file.fd, self._watch).finish(os.fstat(file.fd).st_size)
                self._hashed[file.name] = now, digest
        self._judge()

    def confirm(self) -> None:
        """Hashes what was never hashed; nearly all of it was read by then, and is not read again.

        Raises BadHome where what was read is not the base, and NotYet where it was touched meanwhile.
        """
        for file in self._opened.files:
            if file.name not in self._hashed:
                self._hashed[file.name] = file.stamp, file.reader.sha256()
        self._judge()
        if touched := next((file.name for file in self._opened.files if self._touched(file)), None):
            raise touched_meanwhile(f"state/base/{touched}")

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _touched(self, file: OpenFile) -> bool:
        return stamp(os.fstat(file.fd)) != self._hashed[file.name][0]

    def _check_beside(self, name: str) -> None:
        """A configuration or tokenizer file, which every version has a copy of."""
        path = self._home.base / name
        try:
            now = stamp(path.stat())
            if name not in self._hashed or self._hashed[name][0] != now:
                self._hashed[name] = now, entry(path).sha256
        except OSError as error:
            self._refuse(name, error.strerror or str(error))
        if self._hashed[name][1] != self._listed[name].sha256:
            self._refuse(name, "its sha256 is not that of version 0's")

    def _judge(self) -> None:
        """Raises BadHome where all weights are hashed and are not the base's."""
        digests = {file.name: self._hashed[file.name][1] for file in self._opened.files if file.name in self._hashed}
        if len(digests) < len(self._opened.files) or identity(digests) == self._record.sha256:
            return
        others = [name for name, digest in digests.items() if name in self._listed]
        others = [name for name in others if digests[name] != self._listed[name].sha256]
        self._refuse(others[0] if others else min(digests), "its sha256 is not the registry's")

    def _refuse(self, name: str, why: str) -> NoReturn:
        damaged = f"the base in state/base is damaged: {name}: {why}"
        wanted = self._listed.get(name)
        for head in self._heads:
            copy = self._home.version(head, 0) / name
            if wanted and self._sha256(copy) == wanted.sha256:
                putting_back = f"cp {quote(str(copy))} {quote(str(self._home.base / name))}"
                raise BadHome(damaged, f"`{putting_back}`, then start the daemon again")
        raise BadHome(damaged, f"put {self._home.base / name} back from a backup, then start the daemon again")

    def _sha256(self, path: Path) -> str | None:
        try:
            return entry(path, read=self._watch.advance).sha256
        except OSError:
            return None


def separate(home: Home, reader: Reader, watch: Watch = SILENT) -> list[str]:
    """Gives each file of the base that has further names, such as version 0's in a home made by an earlier mainstem, an
    inode of its own; returns their names. Raises BadHome where the base is damaged, and OSError.
    """
    shared = [name for name in names_below(home.base) if (home.base / name).stat().st_nlink > 1]
    if shared:
        with Base(home, reader, watch) as base:
            base.check()
            base.confirm()
        for name in shared:
            new = home.tmp / uuid4().hex
            try:
                durable.copy_file(home.base / name, new, watch.advance)
                durable.rename(new, home.base / name)
            finally:
                durable.remove(new)
    return shared


class States:
    """The heads' state files. One that this process wrote, or hashed, is hashed again only where it was touched."""

    def __init__(self, home: Home, watch: Watch = SILENT) -> None:
        self._home = home
        self._watch = watch
        self._sound: dict[Path, tuple[str, Stamp]] = {}  # the manifest's sha256 and the file's stamp
        self._reading: list[_Reading] = []

    def check(self, heads: Sequence[HeadTip], base: Schema) -> None:
        """Raises BadHome where a head cannot go on from its live version's state, as far as its header tells."""
        for tip in heads:
            if tip.totals.experts:
                with ExitStack() as files:
                    self._opened(tip, base, files)

    def open(self, tip: HeadTip, base: Schema, files: ExitStack) -> TensorReader:
        """The accumulators of a head's live version, until `files` closes. Raises BadHome."""
        path, fd, now, reader = self._opened(tip, base, files)
        known = self._sound.get(path) == (tip.version.manifest_sha256, now)
        hashing = None if known else files.enter_context(_Hashing(fd, now[2], self._watch))
        self._reading.append(_Reading(path, fd, now, tip.version, hashing))
        files.callback(self._reading.clear)
        return reader

    def _opened(self, tip: HeadTip, base: Schema, files: ExitStack) -> tuple[Path, int, Stamp, TensorReader]:
        path = self._home.head_state(tip.head.name, tip.version.number) / STATE_FILE
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            files.callback(os.close, fd)
            now = stamp(os.fstat(fd))
            reader = TensorReader(fd, watch=self._watch)
        except FileNotFoundError:
            raise _bad_state(self._home, path, "it is gone") from None
        except (NotADirectoryError, IsADirectoryError) as error:
            raise _bad_state(self._home, path, str(error.strerror)) from None
        except BadFile as error:
            raise _bad_state(self._home, path, str(error)) from error
        other = [spec.name for spec in state_specs(tip.method, base) if reader.specs.get(spec.name) != spec]
        if other:
            raise BadHome(
                f"{path.relative_to(self._home.root)} has no {shown(other[0])} as {tip.method.name} keeps it now: an"
                " earlier mainstem merged it by another rule",
                f"nothing was merged; merge the archive again, by today's rules: `{again(self._home)}`",
            )
        return path, fd, now, reader

    def confirm(self) -> None:
        """After all was read: raises BadHome where a state is not its version's, and NotYet where it was touched."""
        for one in self._reading:
            if one.hashing and self._sound.get(one.path) != (one.version.manifest_sha256, one.stamp):
                if one.hashing.finish() != _state_sha256(self._home, one.version):
                    raise _bad_state(self._home, one.path, "its sha256 is not the manifest's")
                self._sound[one.path] = one.version.manifest_sha256, one.stamp
            if stamp(os.fstat(one.fd)) != one.stamp:
                raise touched_meanwhile(str(one.path.relative_to(self._home.root)))

    def written(self, versions: Sequence[tuple[str, int, str]]) -> None:
        """Takes note of what was just published, by head, number and the manifest's sha256: it was hashed as it was
        written."""
        paths = {self._home.head_state(head, n) / STATE_FILE: sha256 for head, n, sha256 in versions}
        self._sound = {path: (sha256, stamp(path.stat())) for path, sha256 in paths.items()}


@contextmanager
def sound_ground(base: Base, states: States, confirm: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What is read in the block is the base and each head's own state, or it raises; `confirm` may look at more.

    Whatever the block raises of an expert may be the fault of ours: that is looked at first.
    """

    def confirm_all() -> None:
        base.confirm()
        states.confirm()
        confirm()

    base.check()
    try:
        yield
    except (ProjectorError, RuntimeError):  # torch's, where the arithmetic fails
        confirm_all()
        raise
    confirm_all()


class _Hashing:
    """Hashes a file in a thread of its own, while others read it in whatever order; given up at the block's end."""

    def __init__(self, fd: int, size: int, watch: Watch) -> None:
        self._digest = RunningDigest(fd, watch)
        self._size = size
        self._given_up = False
        self._failed: Exception | None = None
        self._thread = Thread(target=self._work, name="hash")

    def finish(self) -> str | None:
        """The sha256; None where the file has become shorter. Raises what reading it raised: OSError, or Abandoned."""
        self._thread.join()
        if self._failed and not isinstance(self._failed, BadFile):
            raise self._failed
        return None if self._failed else self._digest.finish(self._size)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up = True
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._digest.frontier < self._size and not self._given_up:
                self._digest.catch_up(min(self._size, self._digest.frontier + HASH_BYTES))
        except (OSError, BadFile, Abandoned) as error:
            self._failed = error


@dataclass(frozen=True)
class _Reading:
    """A state while it is read; hashing: None where it was known to be sound."""

    path: Path
    fd: int
    stamp: Stamp
    version: Version
    hashing: _Hashing | None


def damaged(error: BadFile) -> BadHome:
    """What to raise where a file of ours cannot be read as what it is."""
    return BadHome(
        f"a file of the base or of a head's state is damaged: {error}",
        "`mainstem verify` names it: restore it from a backup; the experts are still in the inbox",
    )


def touched_meanwhile(what: str) -> NotYet:
    """What to raise where one of our own files was written to while it was read: the expert is taken again."""
    return NotYet(Reason.CHANGED, f"{what} was touched while an expert was merged", "leave it alone: it is private")


def _listed(home: Home, reader: Reader) -> Mapping[str, FileEntry]:
    """The files that version 0 has of the base, from the first manifest of it that is the registry's."""
    for head in reader.heads():
        version = reader.version(head.name, 0)
        if version and (manifest := _manifest(home, version)):
            return {name: file for name, file in manifest.files.items() if name != CARD}
    return {}


def _state_sha256(home: Home, version: Version) -> str | None:
    manifest = _manifest(home, version)
    return manifest.state.sha256 if manifest and manifest.state else None


def _manifest(home: Home, version: Version) -> Manifest | None:
    """A version's manifest; None where it is not the one that the registry knows."""
    try:
        return Manifest.read(home.manifest(version.head, version.number).read_bytes(), version.manifest_sha256)
    except (OSError, ValueError):
        return None


def _bad_state(home: Home, path: Path, why: str) -> BadHome:
    return BadHome(
        f"{path.relative_to(home.root)} is damaged: {why}",
        f"nothing was merged; put it back from a backup, or merge the archive again: `{again(home)}`",
    )


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
