"""A real daemon for the demo: its own process, watched and fed from outside as a trainer and a consumer would."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from safetensors.torch import load, save_file
from torch import Tensor

from daemon.errors import DaemonError, Reason
from daemon.layout import is_weights

START_SECONDS = 60.0
MERGE_SECONDS = 120.0
DIGITS = "held-out.safetensors"  # in the home, for its evaluator
RULES = ("mean >= live else reject", "each >= live - 0.1")
ENVIRONMENT = {"MAINSTEM_INBOX__SETTLE_SECONDS": "0.3", "MAINSTEM_LOG__FORMAT": "json"}


@dataclass(frozen=True)
class Live:
    """A running daemon: where it listens and where its inbox is."""

    url: str
    inbox: Path
    log: Path

    def drop(self, name: str, weights: Mapping[str, Tensor], task: str) -> None:
        """Puts an expert into the inbox the safe way: under a temporary name, then renamed."""
        unfinished = self.inbox / f"{name}.part"
        unfinished.mkdir()
        save_file(dict(weights), unfinished / "model.safetensors")
        (unfinished / "expert.json").write_text(json.dumps({"task": task}))
        unfinished.replace(self.inbox / name)

    def live(self) -> int:
        """The live version of the head main, as any consumer is told."""
        version: int = self._json("/v1/heads/main/latest")["version"]
        return version

    def wait_for(self, version: int) -> None:
        """Returns once version `version` of the head main is live. Raises DaemonError after MERGE_SECONDS."""
        self._wait(lambda: self.live() == version, f"version {version} did not become live")

    def outcome(self, name: str) -> Mapping[str, Any]:
        """What became of an expert, once the daemon has told. Raises DaemonError after MERGE_SECONDS."""

        def newest() -> Mapping[str, Any]:
            rows: list[Mapping[str, Any]] = self._json("/v1/experts?limit=1")["experts"]
            return rows[0] if rows else {}

        self._wait(lambda: newest().get("name") == name, f"nothing became of {name}")
        return newest()

    def type(self, *words: str) -> float:
        """Runs `mainstem WORDS` on the daemon's home, as a person would; seconds from then to another live version."""
        before, started = self.live(), time.monotonic()
        command = [sys.executable, "-m", "daemon", *words, "--home", str(self.inbox.parent)]
        with subprocess.Popen(command):
            self._wait(lambda: self.live() != before, f"{words[0]} changed nothing")
            return time.monotonic() - started

    def _wait(self, there: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + MERGE_SECONDS
        while not there():
            if time.monotonic() > deadline:
                raise DaemonError(Reason.UNKNOWN, otherwise, f"its log is {self.log}")
            time.sleep(0.05)

    def fetch(self) -> dict[str, Tensor]:
        """The latest merged weights over HTTP, from however many files they are in, held against their manifest."""
        manifest = self._json("/v1/heads/main/latest")
        weights: dict[str, Tensor] = {}
        for file in manifest["files"]:
            name = file["name"]
            if is_weights(name) and name.endswith(".safetensors"):  # not their index
                content = self._get(f"/v1/heads/main/versions/{manifest['version']}/files/{name}")
                if hashlib.sha256(content).hexdigest() != file["sha256"]:
                    raise DaemonError(Reason.UNKNOWN, f"{name} is not what its manifest says", "please report this")
                weights |= load(content)
        return weights

    def metric(self, name: str) -> list[str]:
        """The scraped lines of one metric."""
        return [line for line in self._get("/metrics").decode().splitlines() if line.startswith(name)]

    def _json(self, path: str) -> Any:
        return json.loads(self._get(path))

    def _get(self, path: str) -> bytes:
        with urlopen(self.url + path, timeout=10) as answer:
            content: bytes = answer.read()
        return content


def settings() -> bytes:
    """The home's mainstem.toml: each version is scored before it goes live, and held against two rules."""
    command = [sys.executable, "-m", "daemon.demo.score", "{folder}", DIGITS]
    return f"[evaluate]\ncommand = {json.dumps(command)}\nrequire = {json.dumps(RULES)}\n".encode()


@contextmanager
def daemon(home: Path, port: int) -> Iterator[Live]:
    """`mainstem run` on a home, ready; stopped with SIGTERM at the end of the block."""
    log = home / "daemon.log"
    command = [sys.executable, "-m", "daemon", "run", "--home", str(home), "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, **ENVIRONMENT})
    try:
        yield _ready(process, home, log)
    finally:
        process.terminate()
        process.wait()


def _ready(process: "subprocess.Popen[bytes]", home: Path, log: Path) -> Live:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if '"listening"' in line:
                live = Live(json.loads(line)["url"].rstrip("/"), home / "inbox", log)
                if _answers(f"{live.url}/readyz"):
                    return live
        time.sleep(0.05)
    raise DaemonError(Reason.UNKNOWN, "the daemon did not start", f"its log: {log.read_text()[-500:]}")


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except URLError:
        return False
