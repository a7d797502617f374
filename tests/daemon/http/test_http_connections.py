"""How many connections there may be, and how long a client may keep us waiting."""

import os
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.http import HttpServer, connections, create_app
from daemon.layout import Home
from registry.reader import Reader
from tests.daemon.processes import running, until
from tests.models import write_expert

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

FILE = "/v1/heads/main/versions/1/files/model.safetensors"
BUFFERED = 16 << 20  # more than lies between a server and a client that does not read


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.6)
    monkeypatch.setattr(connections, "LOOK_SECONDS", 0.1)


@contextmanager
def serving(line: "Line", stall_seconds: float = 1.0) -> Iterator[tuple[str, int]]:
    with Reader.open(line.home.registry) as reader:
        app = create_app(line.home, reader, CollectorRegistry(), lambda: None)
        with HttpServer(app, "127.0.0.1", 0, stall_seconds) as address:
            yield address


def asking(address: tuple[str, int], request: bytes, buffer: int = 0) -> socket.socket:
    """A connection on which that was sent; with a small receive buffer where one is asked for."""
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(10)
    connection.connect(address)
    connection.sendall(request)
    return connection


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def closed(connection: socket.socket) -> bool:
    """True where the server has closed it, whatever is still to be read."""
    connection.settimeout(0.01)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def held(path: Path) -> int:
    """How many descriptors of this process are of that file."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").removesuffix(" (deleted)") == str(path)
    return found


def trickle(connection: socket.socket, data: bytes) -> None:
    """Sends a byte at a time, for as long as that is possible."""
    with suppress(OSError):
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("sent", "slowly"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", b""),
        (b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"x" * 10_000),
        (get("/livez"), b""),
        (get("/livez"), b"GET / HTTP/1.1\r\nX-Slow: " + b"x" * 10_000),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n", b"x" * 9000),
    ],
    ids=["nothing", "half a head", "a slow head", "no second request", "a slow second one", "a slow body after all"],
)
def test_an_idle_connection_is_closed(line: "Line", sent: bytes, slowly: bytes) -> None:
    with serving(line) as address, asking(address, sent) as connection:
        sender = threading.Thread(target=trickle, args=(connection, slowly))
        sender.start()
        assert until(lambda: closed(connection), 10)
        sender.join()


def test_a_connection_in_use_stays_open(line: "Line") -> None:
    with serving(line) as (host, port), httpx.Client(base_url=f"http://{host}:{port}", trust_env=False) as client:
        for _ in range(5):
            assert client.get("/livez").status_code == 200
            time.sleep(0.3)
        assert len(client._transport._pool.connections) == 1  # type: ignore[attr-defined]


def test_a_client_that_waits_for_a_version_is_not_idle(line: "Line") -> None:
    with serving(line, 0.3) as (host, port):
        address = f"http://{host}:{port}/v1/heads/main/latest?wait_for=9&timeout=1.5"
        assert httpx.get(address, trust_env=False).status_code == 204


@pytest.mark.parametrize("reads", [0, 10], ids=["nothing", "next to nothing"])
def test_a_download_that_stalls_is_cut_off_and_lets_go_of_its_file(line: "Line", reads: int) -> None:
    line.publish(os.urandom(BUFFERED))
    weights = line.home.version("main", 1) / "model.safetensors"
    with serving(line) as address, asking(address, get(FILE), 4096) as connection:
        assert until(lambda: held(weights) == 1, 5)
        weights.unlink()
        deadline = time.monotonic() + 20
        while held(weights) and time.monotonic() < deadline:
            with suppress(ConnectionResetError):
                connection.recv(reads) if reads else None
            time.sleep(0.05)
        assert not held(weights)


def test_a_slow_but_honest_download_is_not_cut_off(line: "Line") -> None:
    """Over many times the stall's seconds; what our own buffer holds moves far more seldom than the client reads."""
    weights = os.urandom(BUFFERED)
    line.publish(weights)
    with serving(line, 0.5) as address, asking(address, get(FILE), 4096) as connection:
        deadline = time.monotonic() + 2.5
        got = 0
        while time.monotonic() < deadline:
            got += len(connection.recv(3000))
            time.sleep(0.02)
        assert got < 2 << 20
        connection.setblocking(True)
        while got < len(weights):
            piece = connection.recv(1 << 20)
            assert piece, "cut off"
            got += len(piece)


def closed_by_them(connection: socket.socket) -> bool:
    """As the system has it, without reading: neither established nor waiting for us."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1


def test_idle_connections_make_room(line: "Line", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 8)
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 60.0)
    monkeypatch.setattr(connections, "YOUNG_SECONDS", 0.0)
    with serving(line) as address, ExitStack() as open_sockets:
        idle = [open_sockets.enter_context(asking(address, b"")) for _ in range(30)]
        assert until(lambda: sum(map(closed, idle)) == 22, 10)
        assert [closed(connection) for connection in idle] == [True] * 22 + [False] * 8, "the oldest go first"
        host, port = address
        assert httpx.get(f"http://{host}:{port}/livez", trust_env=False).status_code == 200


def test_who_comes_when_all_are_answered_is_told(line: "Line", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 6)
    monkeypatch.setattr(connections, "TOLD", 3)
    wait = "/v1/heads/main/latest?wait_for=9&timeout=60"
    line.publish(os.urandom(BUFFERED))
    with serving(line, 60) as address, ExitStack() as open_sockets:
        busy = [open_sockets.enter_context(asking(address, get(wait))) for _ in range(3)]
        busy += [open_sockets.enter_context(asking(address, get(FILE), 4096)) for _ in range(3)]
        time.sleep(0.3)
        host, port = address
        answer = httpx.get(f"http://{host}:{port}/livez", trust_env=False)
        assert (answer.status_code, answer.json()["reason"], answer.headers["retry-after"]) == (503, "busy", "5")
        more = [open_sockets.enter_context(asking(address, b"")) for _ in range(20)]
        assert until(lambda: all(map(closed, more)), 10)
        assert not any(map(closed_by_them, busy)), "whoever is being answered stays"
        for connection in busy[:3]:
            connection.close()
        assert until(lambda: httpx.get(f"http://{host}:{port}/livez", trust_env=False).status_code == 200, 10)


def test_never_more_are_answered_than_the_bound(line: "Line", monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was turned away is no idle connection that would make room for the next one."""
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 4)
    line.publish(os.urandom(BUFFERED))
    with serving(line, 60) as address, ExitStack() as open_sockets:
        for _ in range(4):
            open_sockets.enter_context(asking(address, get(FILE), 4096))
        time.sleep(0.3)
        for _ in range(20):
            connection = open_sockets.enter_context(asking(address, get("/livez")))
            assert connection.recv(1000).startswith(b"HTTP/1.1 503 ")


def test_an_answer_that_is_on_its_way_is_not_cut_for_a_newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 2)
    monkeypatch.setattr(connections, "YOUNG_SECONDS", 0.0)
    whole = os.urandom(BUFFERED)

    async def at_once(request: Request) -> Response:
        return Response(whole)

    server = HttpServer(Starlette(routes=[Route("/", at_once)]), "127.0.0.1", 0, 60.0)
    with server as address, asking(address, get("/"), 4096) as slow, ExitStack() as open_sockets:
        time.sleep(0.3)
        for _ in range(6):
            open_sockets.enter_context(asking(address, b""))
        came = _all_of(slow, len(whole))
    assert came.endswith(whole)


def _all_of(connection: socket.socket, size: int) -> bytes:
    """What comes until so many bytes of a body are there."""
    came = bytearray()
    while len(came.partition(b"\r\n\r\n")[2]) < size:
        piece = connection.recv(1 << 20)
        if not piece:
            break
        came += piece
    return bytes(came)


def test_a_request_on_its_way_is_not_cut_for_a_newcomer(line: "Line", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 2)
    monkeypatch.setattr(connections, "YOUNG_SECONDS", 30.0)
    with serving(line, 60) as address, ExitStack() as open_sockets:
        first, second = (open_sockets.enter_context(asking(address, b"GET /livez HTTP/1.1\r\n")) for _ in range(2))
        third = open_sockets.enter_context(asking(address, get("/livez")))
        assert third.recv(1000).startswith(b"HTTP/1.1 503 ")
        for connection in (first, second):
            connection.sendall(b"Host: localhost\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_who_waits_leaves_room_for_others(line: "Line", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 6)
    wait = get("/v1/heads/main/latest?wait_for=9&timeout=60")
    with serving(line) as address, ExitStack() as open_sockets:
        asked = [open_sockets.enter_context(asking(address, wait)) for _ in range(4)]
        answered, _, _ = select.select(asked, [], [], 10)
        assert len(answered) == 1
        assert answered[0].recv(1000).startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    ("hard", "most"), [(256, 64), (1024, 256), (1 << 20, 2000), (resource.RLIM_INFINITY, 2000), (4, 2)]
)
def test_connections_leave_descriptors_to_merging(monkeypatch: pytest.MonkeyPatch, hard: int, most: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    assert connections.most_connections() == most


def test_a_lack_of_descriptors_passes(home: Home, base: Path, tmp_path: Path) -> None:
    """The daemon's limit is set to what it has open; nothing more can be opened, until it is lifted."""
    expert = write_expert(tmp_path / "one.safetensors", base, 2)
    with running("run", "--home", home.root, "--port", "0") as daemon:
        assert until(lambda: daemon.get("/readyz").status_code == 200, 60)
        pid = daemon.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
        expert.rename(home.inbox / expert.name)
        assert until(lambda: any("too many open files" in line for line in daemon.lines), 30)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        daemon.wait_for(1)
        assert daemon.stop() == 0
