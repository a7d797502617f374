"""Named points where a test makes the daemon die or the disk fail. In production `hit` looks up one variable.

MAINSTEM_FAILPOINT=commit.before=kill        at the first pass
MAINSTEM_FAILPOINT=file.sync=eio:3           at the third
MAINSTEM_FAILPOINT=fold.before=hang          and never goes on
"""

import errno
import os
import signal
from threading import Event

POINTS = (
    "take.opened",
    "file.create",
    "file.write",
    "file.sync",
    "folder.sync",
    "fold.before",
    "fold.after",
    "read_out.after",
    "manifest.written",
    "publish.before",
    "rename",
    "publish.after",
    "commit.before",
    "commit.after",
    "link.swap",
    "latest.half",
    "latest.after",
    "archive.before",
    "archive.after",
    "remove",
    "refuse.recorded",
    "refuse.reason_written",
    "recover.begin",
    "recover.swept",
    "recover.end",
)

IDLE_POINTS = ("prepared.before", "prepared.after")  # passed while nothing arrives
GATE_POINTS = ("evaluate.before", "evaluate.after")  # where a version is evaluated
DEED_POINTS = ("turn.after", "case.moved")  # where a person changes the home
OUTBOX_POINTS = ("delivery.made",)  # where others were told, and it is not written down yet

_passes: dict[str, int] = {}


class Injected(Exception):
    """What the action `raise` raises."""


def hit(point: str) -> None:
    """Does what MAINSTEM_FAILPOINT asks for at `point`: kill, hang, eio, enospc or raise; nothing by default."""
    wanted = os.environ.get("MAINSTEM_FAILPOINT")
    if not wanted:
        return
    name, _, action = wanted.partition("=")
    action, _, nth = action.partition(":")
    if name != point:
        return
    _passes[point] = _passes.get(point, 0) + 1
    if _passes[point] != int(nth or 1):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        while True:  # signals are heard, and nobody looks what they said
            Event().wait(1)
    if action in ("eio", "enospc"):
        number = errno.EIO if action == "eio" else errno.ENOSPC
        raise OSError(number, f"{os.strerror(number)} (failpoint {point})")
    if action == "raise":
        raise Injected(point)
    raise ValueError(f"unknown failpoint action {action!r}")
