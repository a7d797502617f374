"""Ctrl-C, heard also by who is importing.

What Python raises for it while a module is imported is lost where it meets the end of a module's lock, and becomes
another error in a library that reads its own classes meanwhile: so it waits until the import is over.
"""

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"
AGAIN_SECONDS = 0.02


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


def _hear(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        _thread.start_new_thread(_send_again, (number,))
    else:
        signal.default_int_handler(number, frame)


def _send_again(number: int) -> None:
    time.sleep(AGAIN_SECONDS)
    os.kill(os.getpid(), number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False
