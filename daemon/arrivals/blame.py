"""Whose fault it was: an error that arose in reading or folding an expert is told apart from those of our own files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from daemon.checkpoints.checkpoint import OpenCheckpoint
from daemon.compute.progress import Abandoned
from daemon.disk import durable
from daemon.errors import DaemonError, Failed, Reason
from projector.errors import DeviceLost, ProjectorError
from registry.errors import RegistryError


@contextmanager
def blaming(expert: OpenCheckpoint | None = None) -> Iterator[None]:
    """Raises Failed for what goes wrong in the block and may be the expert's doing.

    expert: whose files are read among others; without it every file that is read belongs to the expert. What the disk
    says of other files is raised as it is, and so is whatever is an answer already.
    """
    try:
        yield
    except OSError as error:
        theirs = expert.holds(error.filename) if expert else not durable.is_short(error)
        if failed := durable.failed_sync(error):
            raise failed from None
        if not theirs:
            raise _named(error) from None
        raise Failed(
            Reason.UNREADABLE,
            f"it cannot be read: {error.strerror or error}",
            "look for errors of its disk or server in the system's log, copy the file again, and drop it again",
        ) from error
    except (DaemonError, ProjectorError, RegistryError, DeviceLost, Abandoned):
        raise
    except Exception as error:  # torch's, where memory is short or the arithmetic fails, or a fault of ours
        if failed := durable.failed_sync(error):
            raise failed from None
        raise Failed(
            Reason.FAULT,
            f"{type(error).__name__}: {error}",
            "where it is about memory, give the daemon more or set compute.memory_budget, and drop it again; "
            "if not, please report this, with the file",
        ) from error


def _named(error: OSError) -> OSError:
    """The error with the file's path, where it names only a descriptor."""
    if isinstance(error.filename, int):
        with suppress(OSError):
            return OSError(error.errno, error.strerror, os.readlink(f"/proc/self/fd/{error.filename}"))
    return error
