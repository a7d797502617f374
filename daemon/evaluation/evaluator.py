"""Runs the evaluator on a folder: the operator's command, whatever it does. No more of what it prints is kept than has
to be.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from daemon.compute import commands
from daemon.compute.processes import signal_name
from daemon.config import Evaluate
from daemon.errors import NoScores
from daemon.evaluation.scores import FORM, MOST_BYTES, read_scores
from projector.text import shown
from projector.watch import SILENT, Watch
from registry.records import Scores

FOLDER, OUTPUT = "{folder}", "{output}"
RESULTS = "results*.json"  # what lm-evaluation-harness calls its results, in a folder below that is the model's name
LOG_BYTES = 1 << 20
MOST_LINE_BYTES = 4096
MOST_LINES = 10_000  # that are told to whoever hears

LOOK = "read what it wrote, and run it by hand: it runs in the home, with {folder} as a path from the root"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a run gave: the scores, how long it took, and the end of what it wrote (both streams, as they came)."""

    scores: Scores
    seconds: float
    log: bytes


def command_sha256(settings: Evaluate) -> str:
    """What the scores depend on beside the weights: of the command and its environment."""
    said = json.dumps([settings.command, sorted(environment_of(settings).items())])
    return hashlib.sha256(said.encode()).hexdigest()


def check_program(settings: Evaluate, home: Path) -> None:
    """Raises BadConfig where the program of the command is not there, or is none."""
    commands.check_program("evaluate.command", settings.command[0], home, environment_of(settings))


def environment_of(settings: Evaluate) -> dict[str, str]:
    """What the settings put into the command's environment, secrets told."""
    return {name: value.get_secret_value() for name, value in settings.environment.items()}


class Evaluator:
    """The command of `[evaluate]`. It runs in the home, by which a relative path in it is meant."""

    def __init__(
        self, settings: Evaluate, home: Path, watch: Watch = SILENT, hear: Callable[[str], object] = lambda _: None
    ) -> None:
        """watch: its `advance(0)` is called some times a second, and what that raises (Abandoned) ends the command.
        hear: is told each line of its standard error, as it comes.
        """
        self._settings, self._home, self._watch, self._hear = settings, home.absolute(), watch, hear

    def run(self, folder: Path, description: Mapping[str, Any]) -> Evaluated:
        """The scores of what lies in `folder`. description: goes to the command's standard input, as JSON.

        Raises NoScores (its `.log` is the end of what the command wrote) where it failed, took longer than
        timeout_seconds or gave no scores, and what the watch raises. However this returns, the command and its group
        are gone.
        """
        begun, heard = monotonic(), _Heard(self._hear)
        try:
            with _output(self._settings.command) as output:
                self._run(folder.absolute(), output, description, heard)
                scores = _scores(output, heard)
        except NoScores as error:
            error.log = bytes(heard.log)
            raise
        return Evaluated(scores, monotonic() - begun, bytes(heard.log))

    def _run(self, folder: Path, output: Path | None, description: Mapping[str, Any], heard: "_Heard") -> None:
        """Runs the command to its end. Raises NoScores where that is no good one, and what the watch raises."""
        command = [
            argument.replace(FOLDER, str(folder)).replace(OUTPUT, str(output)) for argument in self._settings.command
        ]
        settings = self._settings
        told, hears = json.dumps(description).encode(), (heard.take_output, heard.take_error)
        waits = partial(self._watch.advance, 0)
        try:
            status = commands.run(
                command, self._home, told, settings.timeout_seconds, hears, waits, environment_of(settings)
            )
        except commands.TookTooLong:
            raise NoScores(
                f"the evaluator took longer than {settings.timeout_seconds:.6g} s and was stopped{heard.last()}",
                "give it more in evaluate.timeout_seconds, or let it score fewer items",
            ) from None
        except OSError as error:
            raise NoScores(f"the evaluator cannot be started: {error.strerror}", LOOK) from error
        if status < 0:
            killed = ": the machine's memory may have run out" if status == -SIGKILL else heard.last()
            raise NoScores(f"the evaluator was ended by {signal_name(-status)}{killed}", LOOK)
        if status:
            raise NoScores(f"the evaluator failed (exit status {status}){heard.last()}", LOOK)


class _Heard:
    """What a command wrote: all of its standard output, and the end of both."""

    def __init__(self, hear: Callable[[str], object]) -> None:
        self.output, self.log = bytearray(), bytearray()
        self._hear, self._lines, self._rest, self._last = hear, 0, b"", ""

    def take_output(self, data: bytes) -> None:
        self._keep(data)
        self.output += data
        if len(self.output) > MOST_BYTES:
            raise NoScores(f"the evaluator printed more than {MOST_BYTES} bytes to its standard output", FORM)

    def take_error(self, data: bytes) -> None:
        self._keep(data)
        *ended, rest = re.split(rb"[\r\n]+", self._rest + data)  # bars of progress end in \r
        self._rest = rest[:MOST_LINE_BYTES]
        for line in filter(None, map(_line, ended[: max(0, MOST_LINES - self._lines)])):
            self._hear(line)
        self._lines += len(ended)
        self._last = (ended and _line(ended[-1])) or self._last

    def last(self) -> str:
        """The last line of its standard error, to be put behind what happened."""
        last = _line(self._rest) or self._last
        return f": {last}" if last else ""

    def _keep(self, data: bytes) -> None:
        self.log += data
        del self.log[:-LOG_BYTES]


def _line(written: bytes) -> str:
    """A line as it may be shown."""
    return shown(written.decode(errors="replace").expandtabs().strip())


@contextmanager
def _output(command: Sequence[str]) -> Iterator[Path | None]:
    """An empty folder for results, where the command wants one."""
    if not any(OUTPUT in argument for argument in command):
        yield None
        return
    with TemporaryDirectory(prefix="mainstem-evaluate-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _scores(output: Path | None, heard: _Heard) -> Scores:
    """From the results file that the command left, else from its standard output. Raises NoScores."""
    if output is None:
        return read_scores(bytes(heard.output))
    found = sorted(path for path in output.rglob(RESULTS) if path.is_file() and not path.is_symlink())
    if len(found) > 1:
        raise NoScores(f"the evaluator left {len(found)} files {RESULTS} in {OUTPUT}", "let it leave one")
    if found:
        with found[0].open("rb") as file:
            return read_scores(file.read(MOST_BYTES + 1))
    try:
        return read_scores(bytes(heard.output))
    except NoScores as error:
        raise NoScores(f"there is no {RESULTS} in {OUTPUT}, and {error}", error.hint) from None
