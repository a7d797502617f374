"""That the loop goes on, and who is told: systemd, where it started this process (NOTIFY_SOCKET), and `/livez`.

The loop says so itself, each time that it asks whether it is to stop: between any two pieces of its work, while it
reads, while an evaluator runs, and while it waits. There is no thread that would go on saying so for a loop that hangs.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog

from daemon.home.condition import said_of_itself
from daemon.home.presence import Doing, Running

PATIENCE_SECONDS = 600.0  # between two signs of life, where nobody says otherwise
SIGNS = 8  # that many in the time after which one is missed
WAITS = 4  # the longest wait of the loop is that part of it

Send = Callable[[str], object]


class Supervision:
    """Signs of life of one daemon. Takes no lock: a signal handler calls it, and any thread.

    patience_seconds: how long none may come before the loop counts as hanging.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """environment: as systemd sets it, NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        self._send = self._sender() if environment.get("NOTIFY_SOCKET") else None
        self._watched = _watchdog_seconds(environment)
        self.patience_seconds = self._watched or PATIENCE_SECONDS
        self._seen = time.monotonic()
        self._told_at = float("-inf")
        self._ready = self._stopping = False
        self._status = ""

    def beat(self) -> None:
        """The loop goes on."""
        self._seen = now = time.monotonic()
        if self._send and now - self._told_at >= self.patience_seconds / SIGNS:
            self._told_at = now
            if not self._ready or self._stopping:
                self._tell(self._extended())
            elif self._watched:
                self._tell("WATCHDOG=1")

    def hung(self) -> str | None:
        """Why the loop counts as hanging; None where it goes on."""
        still = time.monotonic() - self._seen
        return f"the loop has not moved for {still:.0f} s" if still > self.patience_seconds else None

    def expects(self, seconds: float) -> None:
        """One piece of work may take so long by itself."""
        self.patience_seconds = max(self.patience_seconds, seconds)

    @property
    def longest_wait_seconds(self) -> float:
        """What the loop may wait at a time."""
        return self.patience_seconds / WAITS

    def hears(self, daemon: Running) -> None:
        """This is what the daemon says of itself now."""
        if not self._send or self._stopping:
            return
        lines = []
        if not self._ready and daemon.doing != Doing.RECOVERING:
            self._ready = True
            lines = ["READY=1"]
            if self._watched:
                lines += [f"WATCHDOG_USEC={_usec(self.patience_seconds)}", "WATCHDOG=1"]
        status = f"STATUS={said_of_itself(daemon)}"
        if lines or status != self._status:
            self._status = status
            self._tell("\n".join([*lines, status]))

    def stops(self) -> None:
        """It was told to stop."""
        self._stopping = True
        self._tell(f"STOPPING=1\nSTATUS=stopping\n{self._extended()}")

    def _extended(self) -> str:
        """Starting and stopping may take that much more from now on."""
        return f"EXTEND_TIMEOUT_USEC={_usec(self.patience_seconds)}"

    def _tell(self, message: str) -> None:
        if self._send:
            with suppress(OSError, ValueError):  # systemd may be starting itself anew: the next sign of life is heard
                self._send(message)

    def _sender(self) -> Send | None:
        try:
            from cysystemd.daemon import sd_notify  # type: ignore[attr-defined]
        except ImportError:
            structlog.get_logger().error(
                "systemd waits to hear that this daemon is ready, and cannot be told: the package cysystemd is missing",
                hint="pip install 'mainstem[systemd]'; or set Type=exec and WatchdogSec=0 in the unit",
            )
            return None
        return lambda message: sd_notify(message, False)


def _usec(seconds: float) -> int:
    return int(seconds * 1e6)


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """After how many silent seconds systemd restarts this process; None where it does not."""
    usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 1e6 if usec.isdecimal() and int(usec) and pid == str(os.getpid()) else None
