"""The command line in processes that can be killed.

`Zygote` imports everything once and never computes; every run is a fork of it, which costs milliseconds where a fresh
interpreter needs seconds for torch. What runs in the fork is `daemon.cli.main` itself.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "MAINSTEM_INBOX__WATCH": "poll",
    "MAINSTEM_INBOX__SETTLE_SECONDS": "0",
    "MAINSTEM_INBOX__SCAN_SECONDS": "0.05",
    "MAINSTEM_COMPUTE__THREADS": "1",
    "MAINSTEM_RETENTION__VERSIONS": "2",
    "MAINSTEM_RETENTION__GRACE_SECONDS": "0",
    "MAINSTEM_LOG__FORMAT": "json",
}
LIMIT_SECONDS = 60  # after which a run that hangs is ended
DISK_FULL_WAIT_SECONDS = 0.05
AGAIN_SECONDS = 0.05
BUSY_SECONDS = 0.1


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exit status, negative for a signal, and what it printed."""

    code: int
    log: str


class Running:
    """A run that has been started and not waited for."""

    def __init__(self, zygote: "Zygote", pid: int, log: Path) -> None:
        self._zygote = zygote
        self.pid = pid
        self._log = log

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text() if self._log.exists() else ""

    def wait(self) -> Ended:
        """Waits for its end; to be asked once."""
        return Ended(int(self._zygote.ask({"wait": self.pid})), self.log)

    @property
    def running(self) -> bool:
        """False once it has ended, waited for or not."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except FileNotFoundError:
            return False
        return status.rpartition(")")[2].split()[0] != "Z"


class Zygote:
    """Starts runs of the command line. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = count()
        environment = os.environ | SETTINGS | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.daemons"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )

    def run(self, *args: str | Path, trace: Path | None = None, **environment: str) -> Ended:
        """Runs `mainstem ARGS` to its end. `trace` is a file that gets the name of every failpoint passed."""
        return self.start(*args, trace=trace, **environment).wait()

    def start(self, *args: str | Path, trace: Path | None = None, **environment: str) -> "Running":
        """Starts `mainstem ARGS`."""
        log = self._folder / f"{next(self._count)}.log"
        request = {
            "args": [str(arg) for arg in args],
            "environment": environment,
            "log": str(log),
            "trace": str(trace) if trace else None,
        }
        return Running(self, int(self.ask(request)), log)

    def ask(self, request: object) -> bytes:
        """One line to the process and its answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _serve() -> None:
    gc.disable()  # it would look through all that is imported again and again

    # What the verbs and the planning of shards import late, and the methods, which are found late: before the fork.
    import alembic.command  # noqa: F401

    import daemon.cli.app
    import daemon.home.founding
    import daemon.logs
    import daemon.service  # noqa: F401
    from projector.methods import methods

    methods()
    gc.freeze()  # the forks share its pages for longer
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                _work(request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _work(request: dict[str, Any]) -> None:
    from daemon import service
    from daemon.arrivals import attempts
    from daemon.cli import main
    from registry import engine

    signal.alarm(LIMIT_SECONDS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that ends by itself is not cut off in its last words
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    service.DISK_FULL_WAIT_SECONDS = DISK_FULL_WAIT_SECONDS
    attempts.AGAIN_SECONDS = AGAIN_SECONDS
    engine.BUSY_TIMEOUT_S = BUSY_SECONDS
    if request["trace"]:
        _trace(request["trace"])
    sys.argv = ["mainstem", *request["args"]]
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _trace(path: str) -> None:
    """Lets every module that passes failpoints write their names to the file instead."""
    from daemon.disk.failpoints import hit

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def record(point: str) -> None:
        os.write(file, f"{point}\n".encode())

    for name, module in list(sys.modules.items()):
        if name.startswith("daemon.") and getattr(module, "hit", None) is hit:
            module.hit = record  # type: ignore[attr-defined]


if __name__ == "__main__":
    _serve()
