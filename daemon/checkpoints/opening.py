"""Opens what lies in a folder that others write to: by descriptor, one path component at a time, never by surprise."""

import errno
import os
import stat
from contextlib import ExitStack, suppress

from daemon.errors import NotYet, Reason, Refused
from projector.text import EXPERT, NEW, shown

READY_MARKER = "_READY"  # a file of that name in a folder says that all of it is there

Stamp = tuple[int, int, int, int, int]


def stamp(status: os.stat_result) -> Stamp:
    """What changes when a file is written to or replaced: device, inode, size, mtime, ctime."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_entry(folder_fd: int, name: str, follow: bool, closing: ExitStack) -> int:
    """Opens a regular file or a folder by one path component; anything else is refused without touching it.

    The descriptor is closed with `closing`. Raises Refused, NotYet where the name is gone or may not be read (yet), or
    OSError.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        # looked at before it is opened: opening a device can have effects of its own
        mode = os.stat(name, dir_fd=folder_fd, follow_symlinks=follow).st_mode
        if stat.S_ISLNK(mode):
            raise _symlink(folder_fd, name)
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise not_a_file(name)
        fd = os.open(name, flags, dir_fd=folder_fd)
    except FileNotFoundError:
        raise NotYet(Reason.CHANGED, f"{shown(name)} is no longer there", "nothing to do, if you moved it") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _symlink(folder_fd, name) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NotYet(
                Reason.UNREADABLE,
                f"{shown(name)} cannot be read: {error.strerror}",
                f"make it readable for the daemon, as its owner: `chmod -R a+rX {EXPERT}`",
            ) from None
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise not_a_file(name) from None
        raise
    closing.callback(os.close, fd)
    if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISDIR(os.fstat(fd).st_mode)):
        raise not_a_file(name)
    return fd


def folders_with(folder_fd: int, suffix: str) -> list[str]:
    """The folders just below that hold a file whose name ends so. Sorted."""
    with os.scandir(folder_fd) as entries:
        folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    found = []
    for name in sorted(folders):
        with suppress(OSError):  # one that cannot be read
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
            try:
                found += [name] if any(below.endswith(suffix) for below in os.listdir(fd)) else []
            finally:
                os.close(fd)
    return found


def not_a_file(name: str) -> Refused:
    """What is neither a file nor a folder: a FIFO, a device, a socket."""
    return Refused(Reason.NOT_A_FILE, f"{shown(name)} is neither a file nor a folder", "drop a .safetensors file")


def _symlink(folder_fd: int, name: str) -> Refused:
    """A relative one may lead elsewhere, once it is moved."""
    target = ""
    with suppress(OSError):
        target = os.readlink(name, dir_fd=folder_fd)
    copy = f"`cp -rL {EXPERT} {NEW}`" if target.startswith("/") else "`cp -rL`, from where it lay"
    return Refused(
        Reason.SYMLINK,
        f"{shown(name)} is a symbolic link to {shown(target)}",
        f"copy it again with what it leads to: {copy}",
    )
