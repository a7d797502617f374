"""Runs an operator's command to its end: the evaluator, a hook.

It may do what it likes: print gigabytes, hang, leave processes behind that hold its outputs open, be killed. It runs in
a process group of its own, which ends with us, and is waited for until its time is over.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector, SelectorKey
from shutil import which
from tempfile import TemporaryFile
from time import monotonic

from daemon.compute.processes import end, has_ended, leashed
from daemon.errors import BadConfig
from projector.text import shown

SECRETS = (
    "MAINSTEM_TOKEN",
    "MAINSTEM_HTTP",
    "MAINSTEM_HTTP__WRITE_TOKEN",
    "MAINSTEM_WEBHOOKS",
    "MAINSTEM_EVALUATE",
)  # in any case
SECRET_TABLE = "MAINSTEM_EVALUATE__ENVIRONMENT"  # what the evaluator is given, a hook is not; nor what is in it
READ_BYTES, PIPE_BYTES = 1 << 16, 4 << 20  # at a time; more than a pipe holds
TICK_SECONDS = 0.1
LAST_TICK_SECONDS = 0.01  # once it has closed its outputs: it is about to end

Take = Callable[[bytes], object]
"""Hears what a command writes, as it comes."""


class TookTooLong(Exception):
    """Its time was over."""


def environment(more: Mapping[str, str] = {}) -> dict[str, str]:
    """What a command finds in its environment: ours without our secrets, and `more`."""
    kept = {name: value for name, value in os.environ.items() if not _is_secret(name.upper())}
    return kept | dict(more)


def _is_secret(name: str) -> bool:
    return name in SECRETS or name.startswith(SECRET_TABLE)


def check_program(setting: str, program: str, home: Path, more: Mapping[str, str] = {}) -> None:
    """Raises BadConfig where the program of a command is not there, or is none. It is looked for as it would be run: in
    the PATH of its own environment, or from the home where it is a path.
    """
    file = home.absolute() / program
    if "/" not in program:
        if not which(program, path=environment(more).get("PATH", os.defpath)):
            own = ", or the one in evaluate.environment" if setting.startswith("evaluate") else ""
            hint = f"install it, or give its whole path; the daemon's PATH counts{own}"
            raise BadConfig(f"{setting}: no program {shown(program)} is on PATH", hint)
    elif not file.is_file():
        raise BadConfig(
            f"{setting}: there is no file {shown(str(file))}",
            "put it there, or give another path: a relative one counts from the home",
        )
    elif not os.access(file, os.X_OK):
        raise BadConfig(
            f"{setting}: {shown(str(file))} is not executable",
            f'`chmod +x {shlex.quote(str(file))}`, or let the program that runs it come first, as "python"',
        )


def run(
    command: Sequence[str],
    folder: Path,
    told: bytes,
    seconds: float,
    outputs: tuple[Take, Take],
    waits: Callable[[], object],
    more: Mapping[str, str] = {},
) -> int:
    """Its exit status, negative for a signal. However this returns, the command and its group are gone.

    told: its standard input. outputs: for what it writes to its standard output, and to its standard error. waits: is
    called some times a second, and what it raises ends the command. more: goes into its environment. Raises
    TookTooLong, what `outputs` raise, and OSError where it cannot be started.
    """
    deadline = monotonic() + seconds
    with TemporaryFile() as stdin:
        stdin.write(told)
        stdin.seek(0)
        with leashed(command, folder, environment(more), stdin) as process, DefaultSelector() as open_pipes:
            for pipe, take in zip((process.stdout, process.stderr), outputs, strict=True):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
                open_pipes.register(pipe.fileno(), EVENT_READ, take)
            while not has_ended(process):
                waits()
                if monotonic() > deadline:
                    raise TookTooLong
                for key, _ in open_pipes.select(TICK_SECONDS if open_pipes.get_map() else LAST_TICK_SECONDS):
                    if not _take(key, READ_BYTES):
                        open_pipes.unregister(key.fd)
            end(process)
            for key in open_pipes.get_map().values():  # what it wrote at last; others may hold them open for ever
                _take(key, PIPE_BYTES)
            return process.returncode


def _take(key: SelectorKey, most_bytes: int) -> bool:
    """Passes on what there is in a pipe; False where it is closed."""
    while most_bytes > 0:
        try:
            data = os.read(key.fd, READ_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        key.data(data)
        most_bytes -= len(data)
    return True
