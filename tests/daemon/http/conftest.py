"""A small real home (files on disk, rows in the registry) and a started server over it."""

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from daemon.http import HttpServer, create_app
from daemon.layout import MANIFEST, Home
from registry.reader import Reader
from registry.records import BaseModel, Expert, Head, NewExpert, NewVersion, Status
from registry.store import Store

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HEADS = (
    Head("main", "opcm", {"alpha": 0.5}, live=0, newest=0),
    Head("init", "ema", {"rate": 0.2}, live=0, newest=0),
)
CONFIG = b'{"model_type": "tiny"}\n'
BASE = BaseModel("tiny-base", "ba5e" * 16, parameters=1_500_000, size_bytes=3_000_000, created_at=NOON)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lay(home: Home, head: str, n: int, weights: bytes) -> NewVersion:
    """Writes one version's folder and returns the row that would commit it."""
    folder = home.version(head, n)
    folder.mkdir(parents=True)
    files = {"config.json": CONFIG, "model.safetensors": weights}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    listed = [{"name": name, "size": len(data), "sha256": sha256(data)} for name, data in files.items()]
    raw = json.dumps({"format": 1, "head": head, "version": n, "files": listed}).encode()
    (folder / MANIFEST).write_bytes(raw)
    size = sum(len(data) for data in files.values())
    figures = {"lambda": 1.5} if n else {}
    return NewVersion(head, n, n - 1 if n else None, sha256(raw), size, totals={}, figures=figures)


@dataclass
class Line:
    """A home under construction: publishes versions the way the daemon lays them out."""

    home: Home
    store: Store

    def publish(
        self, weights: bytes, name: str = "expert.safetensors", digest: str | None = None, **more: Any
    ) -> Expert:
        """One merged expert; its version of `main` holds `weights`, that of `init` the same reversed."""
        n = self.store.heads()[0].newest + 1
        rows = [lay(self.home, "main", n, weights), lay(self.home, "init", n, weights[::-1])]
        expert = self.store.commit(self.expert(name, Status.MERGED, digest or sha256(weights), **more), rows)
        self.store.placed(expert.id, f"archive/{expert.id:06d}")
        return expert

    def expert(self, name: str, status: Status, digest: str | None, **more: Any) -> NewExpert:
        norm = 1.25 if status is Status.MERGED else None
        return NewExpert(name, "file", digest, 1234, status, NOON, entry="1:2", norm=norm, **more)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with nothing but version 0, made once: migrating a database takes longer than most tests here."""
    home = Home(tmp_path_factory.mktemp("fresh") / "home")
    home.state.mkdir(parents=True)
    home.inbox.mkdir()
    rows = [lay(home, head.name, 0, b"base weights of " + head.name.encode()) for head in HEADS]
    Store.create(home.registry, BASE, HEADS, rows)
    return home.root


@pytest.fixture
def line(fresh: Path, tmp_path: Path) -> Iterator[Line]:
    root = shutil.copytree(fresh, tmp_path / "home")
    with Store.open(Home(root).registry) as store:
        yield Line(Home(root), store)


@dataclass
class Readiness:
    """What the application is told; a test may change it."""

    why_not: str | None = None


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def origin(line: Line, readiness: Readiness) -> Iterator[str]:
    """A started server; its address without a path."""
    metrics = CollectorRegistry()
    Counter("mainstem_example", "An example.", registry=metrics).inc(3)
    with Reader.open(line.home.registry) as reader:
        app = create_app(line.home, reader, metrics, lambda: readiness.why_not)
        with HttpServer(app, "127.0.0.1", 0) as (host, port):
            yield f"http://{host}:{port}"


@pytest.fixture
def client(origin: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=origin, trust_env=False, verify=False) as client:  # it reads no certificates for that
        yield client


@pytest.fixture
def raw(origin: str) -> Callable[..., tuple[int, bytes]]:
    """Sends a request target exactly as written, and returns the status and everything after the header."""
    host, port = origin.removeprefix("http://").split(":")

    def send(target: bytes, *headers: bytes, method: bytes = b"GET") -> tuple[int, bytes]:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            given = b"".join(header + b"\r\n" for header in (headers or (b"Host: x",)))
            connection.sendall(method + b" " + target + b" HTTP/1.1\r\n" + given + b"Connection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), body

    return send
