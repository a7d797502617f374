"""Other programs: each in a process group of its own, which is gone when we are done with it, or are gone ourselves."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PYTHONHOME")  # without which some Pythons do not start
LEASH = Path(__file__).with_name("leash.py")
_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT


def python(*arguments: str) -> list[str]:
    """A command line for this Python, which looks for modules in no current folder and leaves no bytecode."""
    return [sys.executable, "-P", "-B", *arguments]


def bare_environment() -> dict[str, str]:
    """What a Python of ours needs to start, and nothing of ours besides."""
    return {**{name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}, "PYTHONUTF8": "1"}


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """However this is left, the process, which leads its group, has ended, and its group with it."""
    try:
        yield
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> int:
    """Kills a process that leads its group, and the group; its exit status, which is its own
    where it had ended before. Only while nobody has waited for it is the group surely the one it led.
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode


@contextmanager
def leashed(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], stdin: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in a folder, both its outputs pipes. However this is left, its group is gone; it is so, too, when
    this process is killed.

    The process is the leash's, which ends as the command does. Raises OSError where it cannot be started; of a command
    that cannot, the leash says so on standard error.
    """
    theirs, ours = os.pipe()
    with os.fdopen(theirs, "rb") as end, os.fdopen(ours, "wb", buffering=0) as pipe:
        process = subprocess.Popen(
            python("-S", str(LEASH), str(theirs)),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(theirs,),
            env=bare_environment(),
            cwd="/",
            start_new_session=True,
        )
        with ending(process):
            end.close()
            job = {"command": list(command), "folder": str(folder), "environment": dict(environment)}
            rest = memoryview(json.dumps(job).encode() + b"\n")
            with suppress(BrokenPipeError):  # it has ended already, and its exit status says how
                while rest:
                    rest = rest[pipe.write(rest) :]
            assert process.stdout is not None and process.stderr is not None
            with process.stdout, process.stderr:
                yield process


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """True once it has ended, without waiting for it: `end` can still end its group."""
    return process.returncode is not None or os.waitid(os.P_PID, process.pid, _LOOK) is not None


def signal_name(number: int) -> str:
    """What a signal is called, or its number where it has no name."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
