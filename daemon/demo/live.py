"""A real daemon for the demo: its own process, watched and fed from outside as a trainer and a consumer would."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
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
ENVIRONMENT = {"MAINSTEM_INBOX__SETTLE_SECONDS": "0.3", "MAINSTEM_LOG__FORMAT": "json"}


@dataclass(frozen=True)
class Live:
    """A running daemon: where it listens and where its inbox is."""

    url: str
    inbox: Path
    log: Path

    def drop(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Puts an expert into the inbox the safe way: under a temporary name, then renamed."""
        unfinished = self.inbox / f"{name}.part"
        save_file(dict(weights), unfinished)
        unfinished.replace(self.inbox / name)

    def wait_for(self, version: int) -> None:
        """Returns once version `version` of the head main is live. Raises DaemonError after MERGE_SECONDS."""
        deadline = time.monotonic() + MERGE_SECONDS
        while self._json("/v1/heads/main/latest")["version"] < version:
            if time.monotonic() > deadline:
                raise DaemonError(Reason.UNKNOWN, f"version {version} did not appear", f"its log is {self.log}")
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
