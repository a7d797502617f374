"""An operator's command that stays: it is asked by a line of JSON on its standard input, and answers with one on its
standard output.

As in commands.py it may do what it likes, and runs in a process group that ends with us. What it prints beside its
answers is passed on, so that libraries may say what they want.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from signal import SIGKILL
from time import monotonic
from typing import Any, Self

from daemon.compute.commands import READ_BYTES, TICK_SECONDS, TookTooLong, environment
from daemon.compute.processes import end, has_ended, leashed, signal_name
from projector.text import shown

MOST_LINE_BYTES = 1 << 16


class HungUp(Exception):
    """It ended before it answered; str: how, with the last that it said."""


class Conversation:
    """With one command, from `with` to its end: then it is gone, and its group."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        key: str,
        hear: Callable[[str], object],
        more: Mapping[str, str] = {},
    ) -> None:
        """key: what an answer has, and nothing else that is printed. hear: is told each line that is none. more: goes
        into its environment."""
        self._command, self._folder, self._key, self._hear, self._more = command, folder, key, hear, more
        self._closing = ExitStack()
        self._rests = {"stdout": b"", "stderr": b""}
        self._answers: list[dict[str, Any]] = []
        self._last = ""

    def __enter__(self) -> Self:
        """Starts it. Raises OSError where that fails."""
        with ExitStack() as closing:
            theirs, self._ours = os.pipe()
            closing.callback(lambda: os.close(self._ours))
            with os.fdopen(theirs, "rb") as stdin:
                started = leashed(self._command, self._folder, environment(self._more), stdin)
                self._process = closing.enter_context(started)
            self._pipes = closing.enter_context(DefaultSelector())
            for name, pipe in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
                self._pipes.register(pipe.fileno(), EVENT_READ, name)
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer. Raises HungUp, and TookTooLong after so many seconds."""
        deadline = monotonic() + seconds
        self._answers.clear()  # it was not asked for them
        with suppress(BrokenPipeError):  # it reads no more, and will be found to have ended
            os.write(self._ours, json.dumps(question).encode() + b"\n")
        while not self._answers:
            if monotonic() > deadline:
                raise TookTooLong
            ended = has_ended(self._process)
            heard = self._read()
            if not self._answers and not heard and ended:
                raise HungUp(self._how_it_ended())
        return self._answers[0]

    def last(self) -> str:
        """The last line of its standard error, to be put behind what happened."""
        return f": {self._last}" if self._last else ""

    def _read(self) -> bool:
        """Takes what there is in its pipes, or waits a moment for something; whether there was anything."""
        heard = False
        for key, _ in self._pipes.select(TICK_SECONDS):
            data = os.read(key.fd, READ_BYTES)
            if not data:
                self._pipes.unregister(key.fd)
            heard = heard or bool(data)
            *lines, rest = re.split(rb"[\r\n]+", self._rests[key.data] + data)  # bars of progress end in \r
            self._rests[key.data] = rest[:MOST_LINE_BYTES]
            for line in lines:
                self._take(key.data, line)
        return heard

    def _take(self, pipe: str, line: bytes) -> None:
        if pipe == "stdout":
            with suppress(ValueError, RecursionError):
                said = json.loads(line)
                if isinstance(said, dict) and self._key in said:
                    self._answers.append(said)
                    return
        if said := shown(line.decode(errors="replace").expandtabs().strip()):
            self._hear(said)
            self._last = said if pipe == "stderr" else self._last

    def _how_it_ended(self) -> str:
        status = end(self._process)
        if status == -SIGKILL:
            return "was ended by SIGKILL: the machine's memory may have run out"
        how = f"was ended by {signal_name(-status)}" if status < 0 else f"ended (exit status {status})"
        return f"{how}{self.last()}"
