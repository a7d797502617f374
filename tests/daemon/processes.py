"""The command line in processes of its own, and a running daemon to ask over HTTP."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx

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


def mainstem(*words: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "daemon", *map(str, words)],
        env=environment({"PYTHONPATH": str(root), **variables}),
        cwd=cwd or root,
        capture_output=True,
        text=True,
        timeout=180,
    )


@dataclass
class Daemon:
    """A `mainstem run` or `mainstem serve` in a process of its own."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def origin(self) -> str:
        """http://host:port, as the process reported it."""
        found = until(lambda: next((line for line in self.lines if "http://" in line), None), START_SECONDS)
        assert found is not None, "".join(self.lines)
        return "http://" + found.partition("http://")[2].split("/")[0]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.origin + path, follow_redirects=True, trust_env=False, timeout=20)

    def live(self, head: str = "main") -> int:
        """The live version, as a consumer sees it over HTTP."""
        number: int = self.get(f"/v1/heads/{head}/latest").json()["version"]
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
def running(*words: str | Path, **variables: str) -> Iterator[Daemon]:
    """Starts a long-running command; kills it at the end if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", *map(str, words)],
        env=environment({"PYTHONUNBUFFERED": "1", **variables}),
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    daemon = Daemon(process)
    assert process.stdout is not None
    reader = threading.Thread(target=lambda stream: daemon.lines.extend(stream), args=(process.stdout,))
    reader.start()
    try:
        yield daemon
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def until(ask: Callable[[], Answer], seconds: float) -> Answer:
    """Asks again and again until the answer is true or the time is over; returns the last answer."""
    end = time.monotonic() + seconds
    while not (answer := ask()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer
