"""The only place that makes bytes durable, and the only one that renames, links, locks or removes.

Nothing here is retried: after a failed fsync the kernel may have dropped the pages, so a second call would lie
(SyncFailed ends the process; recovery decides). A full disk is another matter: `is_full` tells it apart.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import NoReturn
from uuid import uuid4

from daemon.disk.failpoints import hit

FILE_MODE = 0o644
FOLDER_MODE = 0o755
COPY_BYTES = 8 << 20
FLUSH_SECONDS = 0.1
PROBE_SECONDS = 0.2
MOST_LEVELS = 32  # of folders in one that was dropped: every path below it stays short enough to be opened
AT_FDCWD = -100  # of <fcntl.h>: paths count from the current folder
RENAME_NOREPLACE = 1  # of <linux/fs.h>
RENAME_EXCHANGE = 2
_hear_sync: Callable[[float], object] | None = None
NO_RENAMEAT2 = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # it is not there, or not for this file system


class SyncFailed(OSError):
    """fsync failed: what is on the disk is unknown, and only a restart finds out."""


def is_full(error: OSError) -> bool:
    """True where the disk, or the quota on it, is full, and that is all that is wrong."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) and failed_sync(error) is None


def is_short(error: BaseException) -> bool:
    """True where this machine was short of descriptors or of memory, and no sync had failed before: it passes, whatever
    was opened then.
    """
    short = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    return short and failed_sync(error) is None


def lock(path: Path) -> int:
    """Takes the exclusive lock on `path`; the descriptor returned holds it. Raises BlockingIOError if it is held."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        _flock(fd)
    except BaseException:
        os.close(fd)
        raise
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def is_locked(path: Path) -> bool:
    """True where a process holds the lock on `path`. Takes it for a moment, which `lock` bears with."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _flock(fd: int) -> None:
    """Who holds it for longer than PROBE_SECONDS has it; shorter, it was somebody's look (`is_locked`)."""
    end = time.monotonic() + PROBE_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(PROBE_SECONDS / 20)


def make_folder(path: Path, *, public: bool = False) -> None:
    """Makes a folder and its parents; no error where it is there already. public: everybody may read in it, and in
    the parents that it makes, whatever the umask says.
    """
    if public and not path.parent.exists():
        make_folder(path.parent, public=True)
    path.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
    if public:
        path.chmod(FOLDER_MODE)


@contextmanager
def new_file(path: Path, size: int | None = None) -> Iterator[int]:
    """A new file, its space reserved, as a descriptor to read and write; synced and closed at the end of the block."""
    fd = create(path, size)
    try:
        hit("file.write")
        yield fd
        sync(fd)
    finally:
        close(fd)


def create(path: str | Path, size: int | None = None, *, below: int | None = None) -> int:
    """A new file, its space reserved, as a descriptor to read and write; the caller closes it, and syncs what is to
    stay. below: the descriptor of the folder in which `path` is a name."""
    hit("file.create")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE, dir_fd=below)
    try:
        os.fchmod(fd, FILE_MODE)
        if size:
            os.posix_fallocate(fd, 0, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file, durably (its folder is the caller's to sync)."""
    with new_file(path) as fd:
        _write(fd, data)


def replace_file(path: Path, data: bytes) -> None:
    """Puts a file with these bytes in place of the one at `path`, if any, at once and durably."""
    new = path.with_name(f".{path.name}.tmp")
    remove(new)
    write_file(new, data)
    rename(new, path)


def note(path: Path, data: bytes) -> None:
    """Writes a file that outlives this process and need not outlive the machine's: nothing is synced."""
    new = path.with_name(f".{path.name}.tmp")
    new.write_bytes(data)
    new.rename(path)


def set_aside(path: Path, size: int) -> None:
    """Makes a file that only takes so many bytes of the disk, where they are there; else there is none."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
    except OSError:
        with suppress(OSError):
            remove(path)


def copy_file(source: Path, target: Path, copied: Callable[[int], object] = lambda _: None) -> None:
    """Copies a file's bytes, durably. `copied` hears of each piece, and may raise to give up."""
    with source.open("rb") as file, new_file(target, source.stat().st_size) as fd:
        while chunk := file.read(COPY_BYTES):
            _write(fd, chunk)
            copied(len(chunk))


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that is never written again; a copy where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
            raise
        copy_file(source, target)


@contextmanager
def syncs_heard(hear: Callable[[float], object]) -> Iterator[None]:
    """While it lasts, `hear` is told how many seconds each fsync took, from any thread."""
    global _hear_sync
    before, _hear_sync = _hear_sync, hear
    try:
        yield
    finally:
        _hear_sync = before


def sync(fd: int) -> None:
    """fsync of a file or folder's descriptor. Raises SyncFailed, or OSError where the disk is full."""
    begun = time.perf_counter()
    try:
        hit("file.sync")
        os.fsync(fd)
    except OSError as error:
        _raise_synced("fsync", error)
    if _hear_sync:
        _hear_sync(time.perf_counter() - begun)


def _raise_synced(call: str, error: OSError) -> NoReturn:
    """What a sync that failed means: of a full disk the error itself, of all else SyncFailed."""
    if is_full(error):
        raise error
    raise SyncFailed(error.errno, f"{call} failed: {error.strerror}") from error


def close(fd: int) -> None:
    """Lets go of a file that was written to: this may be where its file system tells of what it could not write.

    Raises SyncFailed, or OSError where the disk is full.
    """
    try:
        os.close(fd)
    except OSError as error:
        _raise_synced("close", error)


def failed_sync(error: BaseException | None) -> SyncFailed | None:
    """The failed sync that `error` is, or in whose wake it was raised: what tidying up raises would hide it."""
    seen: set[int] = set()
    while error is not None and not isinstance(error, SyncFailed) and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return error if isinstance(error, SyncFailed) else None


@contextmanager
def flushing(descriptors: Sequence[int]) -> Iterator[None]:
    """Writes these files' data to the disk while they are still being written, so that the sync at the end is short.

    It replaces no sync. Raises SyncFailed at the end of the block where the disk failed meanwhile, whatever the block
    itself raised: the sync that follows might not be told again.
    """
    over = Event()
    failed: list[OSError] = []

    def flush() -> None:
        while not over.wait(FLUSH_SECONDS) and not failed:
            try:
                for fd in descriptors:
                    os.fdatasync(fd)
            except OSError as error:
                failed.append(error)

    thread = Thread(target=flush, name="flush")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for error in failed:
            _raise_synced("fdatasync", error)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    hit("folder.sync")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def sync_names(folder_fd: int) -> None:
    """Makes the names in a folder, and in those below it on its file system, durable.

    Raises OSError, which names the descriptor, where they lie deeper than MOST_LEVELS: others made them.
    """
    device, left = os.fstat(folder_fd).st_dev, [(".", 0)]
    while left:
        path, level = left.pop()
        if level > MOST_LEVELS:
            raise OSError(errno.ENAMETOOLONG, f"folders lie more than {MOST_LEVELS} deep", folder_fd)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder_fd)
        try:
            if os.fstat(fd).st_dev == device:
                sync(fd)
                with os.scandir(fd) as entries:
                    below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
                left += [(f"{path}/{name}", level + 1) for name in below]
        finally:
            os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Renames at once and durably, over a file at `target` if there is one."""
    hit("rename")
    source.rename(target)
    _sync_parents(source, target)


def rename_new(source: Path, target: Path) -> None:
    """Renames at once and durably, and never over anything. Raises FileExistsError where `target` is there."""
    hit("rename")
    _rename_new(AT_FDCWD, str(source), AT_FDCWD, str(target))
    _sync_parents(source, target)


@contextmanager
def appearing(target: Path, *, alone: bool = False) -> Iterator[Path]:
    """A new folder, to be filled, that is `target` afterwards: whole and durable, or nothing of it. alone: the file in
    it of that name is. Raises FileExistsError where that is there by then.

    What another process left of it that was killed goes: each holds a lock on its folder for as long as it lives.
    """
    folder = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    with ExitStack() as closing:
        with Folder(target.parent, follow=True) as beside:
            if _hold(beside):  # so that nobody takes a folder for abandoned that its maker has yet to lock
                _remove_abandoned(target)
            closing.callback(remove, folder)
            make_folder(folder, public=True)
            made = closing.enter_context(Folder(folder))
            _hold(made)
        yield folder
        sync_names(made.fd)
        rename_new(folder / target.name if alone else folder, target)


def _remove_abandoned(target: Path) -> None:
    """Removes what `appearing` left of `target` in a process that was killed, as far as it is ours to remove."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.tmp")
    for name in filter(ours.fullmatch, os.listdir(target.parent)):
        with suppress(OSError), Folder(target.with_name(name)) as left:
            fcntl.flock(left.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(target.with_name(name))


def _hold(folder: "Folder") -> bool:
    """Locks a folder until it is closed. False where somebody has it, as a person's own `flock OUT'S-FOLDER mainstem
    convert ...`, or where its file system has no locks: then nobody takes it for abandoned either.
    """
    try:
        _flock(folder.fd)
    except OSError:
        return False
    return True


def exchange(one: Path, other: Path) -> None:
    """Lets two names of one file system change places, at once and durably.

    OSError, with nothing done, where it cannot: one of NO_RENAMEAT2, or EXDEV.
    """
    hit("rename")
    _renameat2(AT_FDCWD, str(one), AT_FDCWD, str(other), RENAME_EXCHANGE)
    _sync_parents(one, other)


def _rename_new(source_fd: int, source: str, target_fd: int, target: str) -> None:
    try:
        _renameat2(source_fd, source, target_fd, target, RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in NO_RENAMEAT2:
            raise
        with suppress(FileNotFoundError):  # all that a file system without the call can do
            os.stat(target, dir_fd=target_fd, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        os.rename(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)


def _renameat2(source_fd: int, source: str, target_fd: int, target: str, flag: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    failed = errno.ENOSYS  # a C library that is older than the call
    if hasattr(libc, "renameat2"):
        paths = source_fd, os.fsencode(source), target_fd, os.fsencode(target)
        failed = ctypes.get_errno() if libc.renameat2(*paths, flag) else 0
    if failed:
        raise OSError(failed, os.strerror(failed), target)


def _sync_parents(source: Path, target: Path) -> None:
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def point(link: Path, target: str) -> None:
    """Lets the symbolic link `link` name `target`, at once and durably."""
    new = link.with_name(f".{link.name}.tmp")
    remove(new)
    new.symlink_to(target)
    hit("link.swap")
    rename(new, link)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder; no error where there is none."""
    hit("remove")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Writes all of it at that place of the file; not durable before the file is synced."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _write(fd: int, data: bytes) -> None:
    """Writes all of it: one call may take less, and says so only by what it returns."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Folder:
    """A folder by its descriptor. What is done in it goes by names of one component and follows no link, so that it
    reaches nothing else, whatever takes the place of the folder's path meanwhile. `close` it.
    """

    def __init__(self, path: str | Path, *, below: "Folder | None" = None, follow: bool = False) -> None:
        """Opens it. `below`: the folder in which `path` is a name. Raises OSError where it is none, or is a link and
        links are not to be followed.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        self.fd: int = os.open(path, flags, dir_fd=below.fd if below else None)

    def make(self, name: str) -> "Folder":
        """A new folder in it. Raises FileExistsError where that name is taken."""
        os.mkdir(name, FOLDER_MODE, dir_fd=self.fd)
        return Folder(name, below=self)

    def create(self, name: str, size: int | None = None) -> int:
        """As `durable.create`, in this folder."""
        return create(name, size, below=self.fd)

    def holds(self, name: str) -> bool:
        """Whether something of that name is in it."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def move(self, name: str, new: str) -> None:
        """Renames within it, at once and durably, over a file of the new name if there is one."""
        hit("rename")
        os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.sync()

    def move_new(self, name: str, target: "Folder") -> None:
        """Moves what has that name to `target`, as `rename_new` does."""
        hit("rename")
        _rename_new(self.fd, name, target.fd, name)
        target.sync()
        self.sync()

    def remove(self, name: str) -> None:
        """As `durable.remove`, in this folder."""
        hit("remove")
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode):
                shutil.rmtree(name, dir_fd=self.fd)  # it refuses a link that has taken the folder's place
            else:
                os.unlink(name, dir_fd=self.fd)

    def sync(self) -> None:
        """As `sync_folder`."""
        hit("folder.sync")
        sync(self.fd)

    def close(self) -> None:
        """Lets go of it: whatever is tried in it then fails."""
        os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
