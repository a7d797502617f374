"""Ctrl-C and SIGTERM, heard also by who is importing, and what is said then.

What a handler raises while a module is imported is lost where it meets the end of a module's lock, and becomes
another error in a library that reads its own classes meanwhile: so it waits until the import is over, for some seconds.
"""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

IMPORTING = "<frozen importlib._bootstrap>"
AGAIN_SECONDS = 0.02
MOST_SECONDS = 10.0  # that an import is waited for: one that hangs is to be ended, too

ANEW = "nothing was made, and the same command begins anew"


@contextmanager
def ending_with(then: str, out: Path | None = None) -> Iterator[None]:
    """Says what the same command does next time, where Ctrl-C or SIGTERM ends what is done inside. out: what that
    makes, whole at once: once it is there the command makes it no more, and that is said instead.
    """
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, KeyboardInterrupt) or end.code == 128 + signal.SIGTERM:
            made = out is not None and os.path.lexists(out)
            typer.echo(f"mainstem: interrupted; {f'{out} is there' if made else then}", err=True)
        raise


@contextmanager
def interruptible() -> Iterator[None]:
    """While it lasts, SIGINT raises KeyboardInterrupt in no import; one that comes during an import does so behind it.
    Where SIGINT is heard otherwise, or ignored, as by what a shell put into the background, that stays."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, _hear)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _hear:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(number: int, frame: FrameType | None) -> None:
    """For SIGTERM: ends as Ctrl-C does, so that what was begun is cleared away."""
    if not _postponed(number, frame):
        sys.exit(128 + number)


def _hear(number: int, frame: FrameType | None) -> None:
    if not _postponed(number, frame):
        signal.default_int_handler(number, frame)


_waiting_since: float | None = None  # when a signal first came that has been postponed since


def _postponed(number: int, frame: FrameType | None) -> bool:
    """True where the signal came during an import, and has not waited for too long; then it comes again."""
    global _waiting_since
    now = time.monotonic()
    since = now if _waiting_since is None else _waiting_since
    postponed = _is_importing(frame) and now - since < MOST_SECONDS
    _waiting_since = since if postponed else None
    if postponed:
        _thread.start_new_thread(_send_again, (number,))
    return postponed


def _send_again(number: int) -> None:
    time.sleep(AGAIN_SECONDS)
    os.kill(os.getpid(), number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False
