"""Hostile uploads against a real server: nothing enters the inbox, nothing is left beside it, it goes on serving."""

import contextlib
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from daemon.arrivals.uploads import Uploads
from daemon.config import Http
from daemon.http import HttpServer, create_app
from daemon.layout import Home
from registry.reader import Reader
from tests.daemon.homes import make_home, tree
from tests.models import write_base

TOKEN = "a-token-of-enough-characters"
BEARER = f"Authorization: Bearer {TOKEN}\r\n".encode()


@dataclass
class Target:
    """A server that takes uploads, and what its home looked like before the first request."""

    home: Home
    address: tuple[str, int]
    before: dict[str, bytes | str]

    def send(self, request: bytes, patience: float = 20) -> tuple[int, bytes]:
        """Sends exactly that, and goes away once it is answered or after `patience` seconds; (status or 0, answer)."""
        with socket.create_connection(self.address, timeout=20) as connection:
            answer = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                connection.sendall(request)
                connection.settimeout(patience)
                while data := connection.recv(65536):
                    answer += data
        return int(answer.split(b" ")[1]) if answer else 0, answer

    def put(self, target: bytes, body: bytes = b"abc", headers: bytes = BEARER) -> tuple[int, bytes]:
        length = f"Content-Length: {len(body)}\r\n".encode()
        return self.send(
            b"PUT " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + length + b"\r\n" + body
        )


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    root = tmp_path_factory.mktemp("uploads")
    home = make_home(root / "home", write_base(root / "base.safetensors", seed=1))
    uploads = Uploads(home, Http.model_validate({"write_token": TOKEN, "upload_bytes": 1 << 20}))
    with Reader.open(home.registry) as reader:
        app = create_app(home, reader, CollectorRegistry(), lambda: None, uploads)
        with HttpServer(app, "127.0.0.1", 0) as address:
            yield Target(home, address, entered(home))


@pytest.fixture
def target(started: Target) -> Iterator[Target]:
    """The server; at the end its home must be what it was, and it must still take a good upload.

    What was cut off is removed a moment after its answer, or is not even begun by then: that of the test before may
    still come and go.
    """
    yield started
    deadline = time.monotonic() + 10
    while (now := entered(started.home)) != started.before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now == started.before
    assert started.put(b"/v1/experts/good.safetensors")[0] == 201
    (started.home.inbox / "good.safetensors").unlink()


def entered(home: Home) -> dict[str, bytes | str]:
    """All of HOME, and what lies beside it."""
    found = tree(home.root.parent)
    return {
        name: content for name, content in found.items() if "registry.sqlite" not in name and name[-8:] != "/uploads"
    }


NAMES = [
    b"..",
    b".",
    b"...",
    b"%2e%2e",
    b"..%2f..%2fpublished%2fevil.safetensors",
    b"%2e%2e%2fevil.safetensors",
    b"..%5cevil.safetensors",
    b"%2fetc%2fevil.safetensors",
    b"a%2fb.safetensors",
    b"a%00.safetensors",
    b"a%0a.safetensors",
    b"a%1b[31m.safetensors",
    b"a%20b.safetensors",
    b"%e2%80%ae.safetensors",
    b"%ff%fe.safetensors",
    b"-%27%22.safetensors",
    b".hidden.safetensors",
    b".uploads",
    b".uploads%2fx.safetensors",
    b"a.safetensors.part",
    b"a.safetensors.tmp",
    b"a.safetensors~",
    b"a.safetensors.AbCd1234",
    b"a" * 201 + b".safetensors",
    b"a" * 60_000,
    b"evil.bin",
    b"evil.pt",
    b"_READY",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:40].decode())
def test_names(target: Target, name: bytes) -> None:
    assert target.put(b"/v1/experts/" + name)[0] in (400, 404, 405)
    if name not in (b"evil.bin", b"evil.pt", b"_READY"):  # good names in a folder, whatever is made of them there
        for path in (b"/v1/experts/" + name + b"/files/a.safetensors", b"/v1/experts/a/files/" + name):
            assert target.put(path)[0] in (400, 404, 405)


TOKENS = [
    b"",
    b"Authorization:\r\n",
    b"Authorization: Bearer\r\n",
    b"Authorization: Bearer \r\n",
    f"Authorization: Bearer {TOKEN[:-1]}\r\n".encode(),
    f"Authorization: Bearer {TOKEN}x\r\n".encode(),
    f"Authorization: Bearer {TOKEN.upper()}\r\n".encode(),
    f"Authorization: Bearer {TOKEN} {TOKEN}\r\n".encode(),
    f"Authorization: Basic {TOKEN}\r\n".encode(),
    f"Authorization: {TOKEN}\r\n".encode(),
    f"Authorization: Bearer wrong\r\nAuthorization: Bearer {TOKEN}\r\n".encode(),
    f"Cookie: token={TOKEN}\r\n".encode(),
    f"X-Authorization: Bearer {TOKEN}\r\n".encode(),
    b"Authorization: Bearer \xff\xfe\xc3\xa4\r\n",
    b"Authorization: Bearer " + b"a" * 50_000 + b"\r\n",
]


@pytest.mark.parametrize("headers", TOKENS, ids=range(len(TOKENS)))
def test_tokens(target: Target, headers: bytes) -> None:
    status, answer = target.put(b"/v1/experts/evil.safetensors", headers=headers)
    assert status == 401
    assert b"\r\nwww-authenticate: Bearer" in answer
    assert TOKEN.encode() not in answer
    for method, path in ((b"PUT", b"evil/files/a"), (b"POST", b"evil/commit"), (b"DELETE", b"evil")):
        request = (
            method
            + b" /v1/experts/"
            + path
            + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            + headers
            + b"Content-Length: 0\r\n\r\n"
        )
        assert target.send(request)[0] == 401


def test_a_token_in_the_address_is_none(target: Target) -> None:
    assert target.put(f"/v1/experts/evil.safetensors?token={TOKEN}".encode(), headers=b"")[0] == 401


BODIES = {
    "shorter than announced": b"Content-Length: 1000\r\n\r\nabc",
    "longer than allowed": b"Content-Length: 99999999999999999999\r\n\r\nabc",
    "a negative length": b"Content-Length: -1\r\n\r\nabc",
    "a length in hex": b"Content-Length: 0x3\r\n\r\nabc",
    "two lengths": b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "chunks without an end": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "a chunk without its bytes": b"Transfer-Encoding: chunked\r\n\r\nffff\r\nabc",
    "no chunk size": b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
    "a chunk size beyond all bounds": b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 19 + b"\r\nabc",
    "another coding": b"Transfer-Encoding: gzip\r\n\r\nabc",
    "more than allowed in chunks": b"Transfer-Encoding: chunked\r\n\r\n200000\r\n" + bytes(2 << 20) + b"\r\n0\r\n\r\n",
    "compressed": b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
    "a part": b"Content-Range: bytes 0-2/3\r\nContent-Length: 3\r\n\r\nabc",
    "a digest of something else": b"Content-Digest: sha-256=:" + b"A" * 43 + b"=:\r\nContent-Length: 3\r\n\r\nabc",
    "a digest that is none": b"Repr-Digest: sha-256=" + b":" * 5000 + b"\r\nContent-Length: 3\r\n\r\nabc",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_bodies(target: Target, body: bytes) -> None:
    for path in (b"evil.safetensors", b"evil/files/a.safetensors"):
        status, _ = target.send(
            b"PUT /v1/experts/" + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + BEARER + body, 1
        )
        assert status == 0 or 400 <= status < 600, "cut off, or refused"
        assert status != 500


def test_a_foreign_page_is_not_let_in(target: Target) -> None:
    """A browser asks first: the answer allows neither its origin nor the header that it would need."""
    request = (
        b"OPTIONS /v1/experts/evil.safetensors HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: https://evil.example\r\n"
        b"Access-Control-Request-Method: PUT\r\nAccess-Control-Request-Headers: authorization\r\n\r\n"
    )
    status, answer = target.send(request)
    assert status == 405
    assert b"access-control" not in answer.lower()
    form = b"POST /v1/experts/evil/commit HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: https://evil.example\r\n"
    assert target.send(form + b"Content-Type: text/plain\r\nContent-Length: 0\r\n\r\n")[0] == 401


def test_a_link_in_the_inbox_is_not_written_through(target: Target, tmp_path: Path) -> None:
    link = target.home.inbox / "evil.safetensors"
    for aim in (tmp_path / "there", tmp_path / "nowhere"):
        (tmp_path / "there").write_bytes(b"precious")
        link.symlink_to(aim)
        assert target.put(b"/v1/experts/evil.safetensors")[0] == 409
        link.unlink()
    assert (tmp_path / "there").read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", [".uploads", "uploads", "base"])
def test_a_link_beside_the_inboxs_entries_leads_nowhere(target: Target, name: str) -> None:
    """Who may write to the inbox, and holds the token, removes and overwrites nothing elsewhere."""
    for aim in (target.home.state, target.home.base, target.home.published):
        assert target.put(b"/v1/experts/base/files/model.safetensors")[0] == 201
        link = target.home.inbox / name
        link.symlink_to(aim)
        try:
            assert target.put(b"/v1/experts/base/files/other")[0] == 201
            committed = target.send(
                b"POST /v1/experts/base/commit HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + BEARER + b"\r\n"
            )
            assert committed[0] == (409 if link.name == "base" else 201)
            if committed[0] == 201:
                shutil.rmtree(target.home.inbox / "base")
            assert link.is_symlink()
            gone = target.send(
                b"DELETE /v1/experts/base HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + BEARER + b"\r\n"
            )
            assert gone[0] == (204 if link.name == "base" else 404)
        finally:
            link.unlink()


def test_a_thousand_cut_connections(target: Target) -> None:
    head = (
        b"PUT /v1/experts/evil.safetensors HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        + BEARER
        + b"Content-Length: 1000\r\n\r\nabc"
    )
    for _ in range(1000):
        with socket.create_connection(target.address, timeout=10) as connection:
            connection.sendall(head)
    calm = 0  # they are gone through one after the other: for a moment between two of them nothing is there
    while calm < 20:
        calm = 0 if list(target.home.uploads.iterdir()) else calm + 1
        time.sleep(0.05)


def test_every_place_held_by_who_sends_nothing_still_lets_readers_in(target: Target) -> None:
    held = []
    try:
        for i in range(40):
            connection = socket.create_connection(target.address, timeout=10)
            path = f"PUT /v1/experts/{i}.safetensors HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
            connection.sendall(path + BEARER + b"Content-Length: 1000\r\n\r\na")
            held.append(connection)
        status, answer = target.send(b"GET /v1/heads HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status == 200
        assert b'"main"' in answer
        assert target.put(b"/v1/experts/one-more.safetensors")[0] == 503
    finally:
        for connection in held:
            connection.close()
