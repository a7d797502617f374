"""What the tests of `mainstem pull` share: a home with versions, servers that misbehave, a network that does."""

import hashlib
import json
import os
import shutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from daemon.http import HttpServer, create_app
from daemon.layout import MANIFEST, Home
from registry.reader import Reader
from tests.daemon.homes import drain, make_home, quick
from tests.models import write_base, write_expert

Meddle = Callable[[Request], Response | None]


def make_line(root: Path, versions: int, hidden: int = 16, **tables: dict[str, object]) -> Home:
    """A home whose heads, main and init, have so many versions beside 0."""
    base = write_base(root / "base", seed=1, hidden=hidden)
    home = make_home(root / "home", base, (("main", "mean", {}), ("init", "ema", {})))
    for n in range(1, versions + 1):
        merge_one(home, n, **tables)
    return home


def merge_one(home: Home, n: int, **tables: dict[str, object]) -> None:
    """Merges one expert more."""
    drop = home.root.parent / f"{n}.safetensors"
    shutil.move(write_expert(drop, home.base, seed=10 + n), home.inbox / drop.name)
    drain(home, quick(**tables))


@contextmanager
def served(home: Home, meddle: Meddle | None = None, port: int = 0) -> Iterator[str]:
    """A server over a home; its address. `meddle` may answer in its place."""
    with Reader.open(home.registry) as reader:
        app: ASGIApp = create_app(home, reader, CollectorRegistry(), lambda: None)
        with HttpServer(_Meddling(app, meddle) if meddle else app, "127.0.0.1", port) as (host, bound):
            yield f"http://{host}:{bound}"


class _Meddling:
    def __init__(self, app: ASGIApp, meddle: Meddle) -> None:
        self._app = app
        self._meddle = meddle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._meddle(Request(scope, receive))
        await (self._app if answer is None else answer)(scope, receive, send)


class Wire:
    """A TCP proxy. `carry(connection, at, chunk)` is asked about each piece of what the server sends.

    connection counts from 0, `at` is the offset in what that connection carried. It returns the bytes to pass on, or
    None to cut the connection there; while it takes its time nothing is passed on.
    """

    def __init__(self, origin: str, carry: Callable[[int, int, bytes], bytes | None]) -> None:
        self._to = int(origin.rpartition(":")[2])
        self._carry = carry
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self.connections = 0
        self.carried = 0

    def __enter__(self) -> "Wire":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._open += [client, server]
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client, self.connections), daemon=True).start()
                self.connections += 1

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        _close(client, server)

    def _down(self, server: socket.socket, client: socket.socket, number: int) -> None:
        at = 0
        with suppress(OSError):
            while data := server.recv(1 << 14):
                passed = self._carry(number, at, data)
                if passed is None:
                    break
                client.sendall(passed)
                at += len(data)
                self.carried += len(data)
        _close(client, server)


def _close(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def forking(work: Callable[[], object]) -> Iterator[int]:
    """Runs `work` in a fork of this process; its process id. Killed at the end if it is still there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def ended(child: int, seconds: float = 60) -> int:
    """Waits for a fork; its exit status, negative for a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise AssertionError("the fork did not end")


def version_in(folder: Path) -> int:
    """The version that a folder holds; asserts that it is whole and that nothing else is there."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for file in manifest["files"]:
        assert hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest() == file["sha256"], file["name"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    assert found == {MANIFEST, *(file["name"] for file in manifest["files"])}
    number: int = manifest["version"]
    return number


def same_bytes(folder: Path, home: Home, version: int) -> bool:
    """True where a pulled folder is the published one."""
    published = {path.name: path.read_bytes() for path in home.version("main", version).iterdir()}
    return published == {path.name: path.read_bytes() for path in folder.iterdir()}
