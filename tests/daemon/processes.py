"""The command line in processes of its own, and a running daemon to ask over HTTP."""

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn, TypeVar

import httpx
import torch

from daemon.cli import main
from daemon.layout import Home
from tests import shims

ROOT = Path(__file__).parents[2]
QUICK = {
    "MAINSTEM_INBOX__SETTLE_SECONDS": "0.1",
    "MAINSTEM_INBOX__PATIENCE_SECONDS": "0.5",
    "MAINSTEM_INBOX__SCAN_SECONDS": "0.2",
    "MAINSTEM_LOG__FORMAT": "json",
}
Answer = TypeVar("Answer")

START_SECONDS = 60  # importing torch takes seconds, on a busy machine many


def environment(more: Mapping[str, str] = {}) -> dict[str, str]:
    """The environment of a child: ours less mainstem's own variables, with quick settings."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("MAINSTEM_")}
    return {**ours, **QUICK, **more}


@functools.cache
def preloaded() -> Path:
    """Where the process listens that has torch and the daemon imported, to be forked by."""
    folder = Path(tempfile.mkdtemp())
    server = shims.started(folder / "socket")
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.wait)
    atexit.register(server.kill)
    return folder / "socket"


def mainstem(*words: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        said = [str(word) for word in words]
        process = shims.Process(preloaded(), said, environment(variables), cwd or ROOT, out.fileno(), err.fileno())
        try:
            status = process.wait(timeout=180)
        finally:
            process.kill()
        for stream in (out, err):
            stream.seek(0)
        return subprocess.CompletedProcess(process.args, status, out.read().decode(), err.read().decode())


def forked(
    *words: str | Path, cwd: Path | None = None, first: Callable[[], None] = lambda: None
) -> subprocess.CompletedProcess[str]:
    """Like `mainstem`, in a fork of this process, which calls `first` before it begins: without the seconds that
    importing torch takes."""
    return forked_each([words], cwd, first)[0]


def forked_each(
    commands: Sequence[Sequence[str | Path]], cwd: Path | None = None, first: Callable[[], None] = lambda: None
) -> list[subprocess.CompletedProcess[str]]:
    """Several commands in one fork, one after the other: a fork takes longer than a command that is refused."""
    with ExitStack() as closing:
        streams = [[closing.enter_context(tempfile.TemporaryFile()) for _ in range(3)] for _ in commands]
        child = os.fork()
        if child == 0:
            _become([[str(word) for word in words] for words in commands], cwd, streams, first)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done = []
        for words, three in zip(commands, streams, strict=True):
            for stream in three:
                stream.seek(0)
            out, err, status = (stream.read().decode() for stream in three)
            done.append(subprocess.CompletedProcess(words, int(status or ended), out, err))
        return done


def rebuild(home: Home, *words: str | Path) -> str:
    """Runs `mainstem rebuild` on the home, which must succeed; what it printed."""
    done = forked("rebuild", "--home", home.root, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _become(
    commands: list[list[str]], cwd: Path | None, streams: list[list[IO[bytes]]], first: Callable[[], None]
) -> NoReturn:
    """Runs the commands in the child, each with its streams for output, errors and status, and ends it."""
    ending = 99
    try:
        torch.set_num_threads(1)  # the parent's threads are not here
        os.chdir(cwd or ".")
        first()
        for words, (out, err, status) in zip(commands, streams, strict=True):
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.write(status.fileno(), str(_run(words)).encode())
            sys.stdout.flush()
            sys.stderr.flush()
        ending = 0
    finally:
        os._exit(ending)


def _run(words: list[str]) -> int:
    sys.argv = ["mainstem", *words]
    try:
        main()
        return 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 98
    except BaseException:
        traceback.print_exc()
        return 99


@dataclass
class Daemon:
    """A `mainstem run` or `mainstem serve` in a process of its own."""

    process: subprocess.Popen[bytes] | shims.Process
    lines: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        """http://host:port, as the process reported it."""
        found = until(lambda: next((line for line in self.lines if "http://" in line), None), START_SECONDS)
        assert found is not None, "".join(self.lines)
        return "http://" + found.partition("http://")[2].split("/")[0]

    def get(self, path: str) -> httpx.Response:
        # unverified: no TLS is spoken here, and reading the certificates takes longer than all the rest
        return httpx.get(self.origin + path, follow_redirects=True, trust_env=False, verify=False, timeout=20)

    def live(self, head: str = "main") -> int:
        """The live version, as a consumer sees it over HTTP.

        Without a grace time a version may be gone between the redirect and its answer, and the client asks again.
        """
        while (answer := self.get(f"/v1/heads/{head}/latest")).status_code == httpx.codes.GONE:
            pass
        number: int = answer.json()["version"]
        return number

    def wait_for(self, version: int, seconds: float = 30) -> None:
        """Waits until `version` of main is live over HTTP."""
        assert until(lambda: self.live() >= version, seconds), "".join(self.lines)
        assert self.live() == version

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@contextmanager
def running(*words: str | Path, fresh: bool = False, **variables: str) -> Iterator[Daemon]:
    """Starts a long-running command; kills it at the end if it is still there.

    It is a fork of a process that has torch imported, or, `fresh`, an interpreter of its own.
    """
    read, write = os.pipe()
    said, more = [str(word) for word in words], environment({"PYTHONUNBUFFERED": "1", **variables})
    process: subprocess.Popen[bytes] | shims.Process
    if fresh:
        command = [sys.executable, "-m", "daemon", *said]
        process = subprocess.Popen(command, env=more, cwd=ROOT, stdout=write, stderr=write)
    else:
        process = shims.Process(preloaded(), said, more, ROOT, write, write)
    os.close(write)
    with os.fdopen(read) as stream:
        daemon = Daemon(process)
        reader = threading.Thread(target=daemon.lines.extend, args=(stream,))
        reader.start()
        try:
            yield daemon
        finally:
            process.kill()
            process.wait()
            reader.join()


def until(ask: Callable[[], Answer], seconds: float) -> Answer:
    """Asks again and again until the answer is true or the time is over; returns the last answer."""
    end = time.monotonic() + seconds
    while not (answer := ask()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def ended(process: int) -> bool:
    """True where the process is gone, or only waits for its parent to hear of it."""
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
