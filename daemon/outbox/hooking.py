"""One attempt to run a hook: the operator's command, in the home, with its arguments filled in and no shell."""

import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from signal import SIGKILL
from threading import Event

from daemon.compute import commands
from daemon.compute.processes import signal_name
from daemon.layout import Home, number
from daemon.outbox.told import MOST_LETTERS, Answer, in_a_line, payload
from registry.records import Delivery

MOST_BYTES = 4096  # of what it writes: the end is kept
LINK_SECONDS = 5.0  # within which `latest` follows what was committed
LOOK_SECONDS = 0.02


class _Stopping(Exception):
    pass


class Hooking:
    """Runs one command. {folder}, {head}, {version} and {adapter} in it stand for those of the version that is live."""

    def __init__(self, home: Home, command: Sequence[str], timeout_seconds: float) -> None:
        self._home = home
        self._command = command
        self._seconds = timeout_seconds
        self._aborted = Event()

    def abort(self) -> None:
        self._aborted.set()

    def deliver(self, delivery: Delivery) -> Answer:
        told = payload(self._home, delivery)
        data = told["data"]
        if data["adapter"] is None and any("{adapter}" in word for word in self._command):
            return Answer(False, f"{data['head']}/{data['version']} has no adapter: set heads.{data['head']}.adapter")
        command = [filled(word, data) for word in self._command]
        self._await_latest(data["head"], data["version"])
        written = bytearray()

        def hear(data: bytes) -> None:
            written.extend(data)
            del written[:-MOST_BYTES]

        try:
            root, said = self._home.root.absolute(), json.dumps(told).encode()
            status = commands.run(command, root, said, self._seconds, (hear, hear), self._wait)
        except commands.TookTooLong:
            return _answer(False, f"took longer than {self._seconds:.6g} s and was stopped", written)
        except OSError as error:
            return Answer(False, f"it cannot be started: {error.strerror}")
        except _Stopping:
            return _answer(False, "ended with the daemon", written)
        if status < 0:
            more = ": the machine's memory may have run out" if status == -SIGKILL else ""
            return _answer(False, f"ended by {signal_name(-status)}{more}", written)
        return _answer(status == 0, f"exit status {status}", written)

    def _await_latest(self, head: str, version: int) -> None:
        """Until `latest` names that version, which is so a moment after it was committed; not for one that is no
        longer live."""
        end = time.monotonic() + LINK_SECONDS
        with suppress(OSError):  # there is no link
            while self._home.latest(head).readlink().name != number(version) and time.monotonic() < end:
                if self._aborted.wait(LOOK_SECONDS):
                    return

    def _wait(self) -> None:
        if self._aborted.is_set():
            raise _Stopping


def filled(word: str, data: dict[str, object]) -> str:
    """An argument with what its names in braces stand for. Only these: other braces stay as they are.

    >>> filled("{head}-{version}: {x}", {"head": "main", "version": 12})
    'main-12: {x}'
    """
    return re.sub(r"\{(folder|head|version|adapter)\}", lambda found: str(data.get(found[1])), word)


def _answer(delivered: bool, what: str, written: bytearray) -> Answer:
    text = in_a_line(written.decode(errors="replace"))[-MOST_LETTERS:]
    return Answer(delivered, f"{what}{text and ': '}{text}")
