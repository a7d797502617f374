"""Keeps an eye on the inbox's folder: it may be renamed, removed, or covered by a mount while the daemon runs."""

import errno
import os
import stat
from threading import Event

import structlog

from daemon.arrivals.inbox import Watcher
from daemon.layout import Home

CLOSED = (errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.ENOTCONN)


class Watching:
    """Listens for events in the folder that is the inbox now. Where none come, the caller's rescans must do."""

    def __init__(self, home: Home, wake: Event, *, events: bool) -> None:
        self._home = home
        self._wake = wake
        self._events = events
        self._watcher: Watcher | None = None
        self._seen: tuple[int, int] | None = None
        self.missing = False
        self.hint = ""  # where none could be listed
        self.moved = False  # another folder is there than at the last look, or the one that was missing
        self._log = structlog.get_logger()

    def look(self) -> str | None:
        """Listens to the folder that is there now; why there is none that could be listed, if so."""
        path, why, self.moved = self._home.inbox, None, False
        self.hint = "put the folder back, or make it"
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno not in (*GONE, *CLOSED):
                raise
            closed = error.errno in CLOSED
            why = f"the inbox {'cannot be listed' if closed else 'is gone'}: {error.strerror}"
            if closed:
                self.hint = "let the daemon's user list it and move things out of it (chmod u+rwx, chown)"
        else:
            if not stat.S_ISDIR(status.st_mode):
                why = "the inbox is no folder"
            elif status.st_dev != self._home.state.stat().st_dev:
                why = "the inbox is on another file system than the rest of the home"
        if why:
            if not self.missing:
                self._log.error(why, inbox=str(path), hint=f"{self.hint}: merging goes on by itself")
            self.missing = True
            return why
        here = status.st_dev, status.st_ino
        if here != self._seen or self.missing:
            self.moved = self._seen is not None
            if self.moved:
                self._log.warning("the inbox is another folder now, or it is back: listing it", inbox=str(path))
            self._seen, self.missing = here, False
            self._listen()
        return None

    def close(self) -> None:
        if self._watcher:
            self._watcher.stop()
            self._watcher = None

    def _listen(self) -> None:
        self.close()
        if not self._events:
            return
        watcher = Watcher(self._home.inbox, self._wake)
        try:
            watcher.start()
        except (OSError, RecursionError) as error:  # too many watches, or folders deeper than the library goes
            self._log.warning("no file system events: the inbox is only listed", error=str(error))
        else:
            self._watcher = watcher
