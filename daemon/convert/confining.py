"""Starts the process that unpickles (daemon/convert/unpickling.py), listens to it, and ends it when its time is over.

It gets two descriptors, an empty environment, a session and process group of its own, and limits that it sets itself
before it looks at the file. What it says is checked here; what it writes is checked by whoever asked for it.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from time import monotonic
from typing import Any

from daemon.compute.processes import bare_environment, end, python, signal_name
from daemon.errors import Reason, Refused
from projector.errors import Reason as ProjectorReason
from projector.text import shown

PROCESS = "daemon.convert.unpickling"
MEMORY_FACTOR, MEMORY_ROOM_BYTES = 2, 512 << 20  # beside what Python and torch map themselves
LEAST_MEMORY_BYTES = 16 << 20  # Python and torch have mapped some MiB that are free yet, and that no limit takes away
SECONDS, BYTES_PER_SECOND = 300, 20_000_000
GROWTH, GROWTH_ROOM_BYTES = 16, 16 << 20  # names that share one storage are written out each
GRACE_SECONDS = 5  # by which the limit on processor time lies beyond the one on the clock
MOST_LINE_BYTES = 64 << 20
MOST_WORDS = 4000  # characters of a refusal
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Options:
    """What the person may choose. None: from the file's size.

    memory_bytes: for the process that reads one file, beside Python and torch, 16 MiB at the least. seconds: for one
    file. key: the entry that holds the weights, nested ones as a/b. strip_prefix: what is taken off the tensors' names.
    Raises Refused.
    """

    memory_bytes: int | None = None
    seconds: float | None = None
    key: str | None = None
    strip_prefix: str = ""

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes < LEAST_MEMORY_BYTES:
            raise Refused(
                Reason.CONVERT,
                f"a limit of {self.memory_bytes} bytes of memory cannot be held: {LEAST_MEMORY_BYTES} are the least",
                "give more with --memory, or leave it away: the limit is then what the file's size asks for",
            )


@dataclass(frozen=True)
class Told:
    """What the process said it did: the format it found, the key under which the weights lay, how many names it
    shortened, which tensors share memory ({"names", "identical"}) and what it left out ({"name", "what"}).
    """

    kind: str
    inside: str
    stripped: int
    shared: list[dict[str, Any]]
    left_out: list[dict[str, str]]


def unpickle(source: int, target: int, options: Options, tell: Callable[[int, int], None]) -> Told:
    """Has the file `source` converted into the new file `target`, both descriptors; `tell` hears (done, total) bytes.

    Raises Refused with the reason that the process gave, or for its end where it gave none. However this returns, the
    process and its group are gone.
    """
    size = os.fstat(source).st_size
    memory = options.memory_bytes or MEMORY_FACTOR * size + MEMORY_ROOM_BYTES
    seconds = options.seconds or SECONDS + size / BYTES_PER_SECOND
    job = {
        "parent": os.getpid(),
        "source": source,
        "target": target,
        "memory_bytes": memory,
        "most_bytes": GROWTH * size + GROWTH_ROOM_BYTES,
        "seconds": ceil(seconds) + GRACE_SECONDS,
        "key": options.key,
        "strip_prefix": options.strip_prefix,
    }
    deadline = monotonic() + seconds
    process = subprocess.Popen(
        python("-m", PROCESS, json.dumps(job)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(source, target),
        env=_environment(),
        cwd="/",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said = _listen(process.stdout.fileno(), deadline, tell)
        if isinstance(said, Told):
            return said
        process.wait(max(0.0, deadline - monotonic()))
        raise _died(process.returncode, said)
    except (TimeoutError, subprocess.TimeoutExpired):
        raise Refused(
            Reason.CONVERT, f"it took longer than {seconds:.6g} s and was stopped", "give it more with --timeout"
        ) from None
    finally:
        end(process)
        process.stdout.close()


def _environment() -> dict[str, str]:
    """What Python needs to find the same packages, and nothing of ours besides."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100 - "" is the current folder
    return {**bare_environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _listen(fd: int, deadline: float, tell: Callable[[int, int], None]) -> Told | str:
    """What the process reported; where it ended without a report, its last line. Raises Refused or TimeoutError."""
    last = ""
    for line in _lines(fd, deadline):
        try:
            said: Any = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            last = line.decode(errors="replace").strip() or last
        elif "report" in said:
            return _told(said["report"])
        elif "refused" in said:
            raise _refused(said["refused"])
        elif isinstance(said.get("done"), int) and isinstance(said.get("total"), int):
            tell(said["done"], said["total"])
        else:
            raise _babble()
    return last


def _lines(fd: int, deadline: float) -> Iterator[bytes]:
    """The lines that come through a pipe until it is closed. Raises TimeoutError, or Refused for a line without end."""
    rest: list[bytes] = []
    held = 0
    while True:
        left = deadline - monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise TimeoutError
        data = os.read(fd, READ_BYTES)
        if not data:
            break
        *ended, begun = data.split(b"\n")
        if ended:
            yield b"".join([*rest, ended[0]])
            yield from ended[1:]
            rest, held = [], 0
        rest.append(begun)
        held += len(begun)
        if held > MOST_LINE_BYTES:
            raise _babble()
    yield b"".join(rest)


def _told(report: Mapping[str, Any]) -> Told:
    """The report, its texts as they may be shown; the fields of its lists are strings, but for `identical`."""
    try:
        return Told(
            kind=shown(report["kind"]),
            inside=shown(report["inside"]),
            stripped=int(report["stripped"]),
            shared=[
                {"names": [shown(name) for name in group["names"]], "identical": bool(group["identical"])}
                for group in report["shared"]
            ],
            left_out=[{"name": shown(one["name"]), "what": shown(one["what"])} for one in report["left_out"]],
        )
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError):
        raise _babble() from None


def _refused(said: Any) -> Refused:
    try:
        reason, detail, hint = said
        known = ProjectorReason(reason) if reason in set(ProjectorReason) else Reason(reason)
        return Refused(known, _printable(detail), _printable(hint))
    except (ValueError, TypeError, AttributeError):
        return _babble()


def _printable(text: str) -> str:
    """A sentence of the process, which may be long, but steers no terminal."""
    return text if text.isprintable() and len(text) <= MOST_WORDS else shown(text)


def _died(status: int, last: str) -> Refused:
    """Why it ended without a word of its own."""
    if status == -signal.SIGKILL:
        what = "the process that read it was killed: the machine's memory may have run out"
    elif status < 0:
        what = f"the process that read it was ended by {signal_name(-status)}: the file may be hostile"
    else:
        what = f"the process that read it failed (exit status {status}): {shown(last)}"
    return Refused(Reason.CONVERT, what, "convert it where there is more memory, or give it more with --memory")


def _babble() -> Refused:
    return Refused(Reason.CONVERT, "the process that read it said what it cannot mean", "report it, with the file")
