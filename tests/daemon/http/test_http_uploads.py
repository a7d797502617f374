"""Uploads: only with the token, whole or not at all, and never over what is there."""

import base64
import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from daemon.arrivals import receiving
from daemon.arrivals.inbox import Inbox
from daemon.arrivals.uploads import AT_ONCE, Uploads
from daemon.config import Http
from daemon.errors import BadConfig
from daemon.http import HttpServer, create_app, upload_routes
from daemon.layout import Home
from daemon.service import Service
from registry.reader import Reader
from tests.daemon.homes import quick
from tests.daemon.processes import until

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line, Readiness

TOKEN = "a-token-of-enough-characters"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
DATA = bytes(range(256)) * 9000  # more than is gathered before it is written
PATH = "/v1/experts/mine.safetensors"


def structured(data: bytes, name: str = "sha-256") -> str:
    digest = hashlib.new(name.replace("-", ""), data).digest()
    return f"{name}=:{base64.b64encode(digest).decode()}:"


class Server:
    """A started server that takes uploads into a home."""

    def __init__(self, line: "Line", readiness: "Readiness", **settings: Any) -> None:
        self.home = line.home
        self.counted: list[tuple[str, int]] = []
        http = Http.model_validate({"write_token": TOKEN, **settings})
        self.uploads = Uploads(self.home, http, lambda *ended: self.counted.append(ended))
        self._reader = Reader.open(self.home.registry)
        app = create_app(self.home, self._reader, CollectorRegistry(), lambda: readiness.why_not, self.uploads)
        self._http = HttpServer(app, "127.0.0.1", 0)
        self.address = self._http.start()
        self.client = httpx.Client(base_url=f"http://{self.address[0]}:{self.address[1]}", trust_env=False, timeout=20)

    def put(self, path: str = PATH, content: Any = DATA, **headers: str) -> httpx.Response:
        return self.client.put(path, content=content, headers={**BEARER, **headers})

    def begin(self, path: str = PATH, length: int = 10_000_000) -> socket.socket:
        """A connection on which a body was announced, and 100 000 bytes of it sent."""
        connection = socket.create_connection(self.address, timeout=20)
        lines = f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(lines.encode() + bytes(100_000))
        words = path.split("/")
        assert until((self.home.uploads / words[3] / f".{words[-1]}.part").exists, 10)
        return connection

    def inside(self) -> list[str]:
        """The inbox as the daemon sees it, settled."""
        return sorted(drop.name for drop in Inbox(self.home.inbox, 0, time.monotonic).scan().settled)

    def left(self) -> list[str]:
        """What lies in the uploads' folder."""
        return sorted(str(path.relative_to(self.home.uploads)) for path in self.home.uploads.rglob("*"))

    def close(self) -> None:
        self.client.close()
        self._http.stop()
        self._reader.close()


@pytest.fixture
def server(line: "Line", readiness: "Readiness") -> Iterator[Server]:
    server = Server(line, readiness)
    yield server
    server.close()


def test_a_file_arrives_whole(server: Server) -> None:
    answer = server.put(**{"Content-Digest": structured(DATA), "Repr-Digest": structured(DATA)})
    digest = hashlib.sha256(DATA).hexdigest()
    assert answer.status_code == 201
    assert answer.json() == {
        "name": "mine.safetensors",
        "size_bytes": len(DATA),
        "sha256": digest,
        "merged": f"/v1/experts/{digest}",
        "experts": "/v1/experts",
    }
    assert answer.headers["location"] == f"/v1/experts/{digest}"
    path = server.home.inbox / "mine.safetensors"
    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.stat().st_nlink == 1
    assert (server.inside(), server.left()) == (["mine.safetensors"], [])
    assert server.counted == [("stored", len(DATA))]


def test_nothing_needs_a_length(server: Server) -> None:
    """Chunked, in pieces of one byte to many."""
    pieces = [DATA[at : at + 1 + at % 7000] for at in range(0, len(DATA), 7000)]
    assert server.put(content=iter(pieces)).status_code == 201
    assert (server.home.inbox / "mine.safetensors").read_bytes() == b"".join(pieces)


def test_many_small_pieces(server: Server) -> None:
    assert server.put(content=(bytes([i % 256]) for i in range(5000))).status_code == 201
    assert (server.home.inbox / "mine.safetensors").read_bytes() == bytes(i % 256 for i in range(5000))


def test_who_expects_a_word_gets_one(server: Server) -> None:
    """As curl does above a megabyte: the body comes only after 100, or never."""
    for token, first in ((TOKEN, b"HTTP/1.1 100"), ("wrong", b"HTTP/1.1 401")):
        with socket.create_connection(server.address, timeout=10) as connection:
            head = f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 3\r\n"
            connection.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
            begun = time.monotonic()
            assert connection.recv(12) == first
            assert time.monotonic() - begun < 3
            if token == TOKEN:
                connection.recv(10_000)  # the rest of that line
                connection.sendall(b"abc")
                assert connection.recv(12) == b"HTTP/1.1 201"
    assert (server.home.inbox / "mine.safetensors").read_bytes() == b"abc"


def test_a_folder_arrives_with_its_commit(server: Server) -> None:
    files = {"model.safetensors": DATA, "config.json": b"{}"}
    for name, data in files.items():
        answer = server.put(f"/v1/experts/mine/files/{name}", data, **{"Content-Digest": structured(data)})
        assert answer.status_code == 201
        assert answer.json()["sha256"] == hashlib.sha256(data).hexdigest()
        assert answer.json()["commit"] == "/v1/experts/mine/commit"
    assert server.inside() == []
    listed = [{"name": name, "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()]
    answer = server.client.post("/v1/experts/mine/commit", json={"files": listed}, headers=BEARER)
    assert answer.status_code == 201
    assert [file["name"] for file in answer.json()["files"]] == ["config.json", "model.safetensors"]
    assert {path.name: path.read_bytes() for path in (server.home.inbox / "mine").iterdir()} == files
    assert (server.inside(), server.left()) == (["mine"], [])


def test_a_file_of_a_folder_can_be_sent_again(server: Server) -> None:
    for data in (b"first", b"second"):
        assert server.put("/v1/experts/mine/files/a.safetensors", data).status_code == 201
    assert server.client.post("/v1/experts/mine/commit", headers=BEARER).status_code == 201
    assert (server.home.inbox / "mine" / "a.safetensors").read_bytes() == b"second"


def test_what_is_left_of_an_earlier_push_is_named_and_given_up_as_the_hint_says(server: Server) -> None:
    for name in ("a.safetensors", "old.safetensors"):
        server.put(f"/v1/experts/mine/files/{name}", b"a")
    body = {"files": [{"name": "a.safetensors", "sha256": hashlib.sha256(b"a").hexdigest()}]}
    answer = server.client.post("/v1/experts/mine/commit", json=body, headers=BEARER)
    assert answer.status_code == 409 and answer.json()["error"] == "sent before, and not named: old.safetensors"
    method, address = answer.json()["hint"].split()[:2]
    assert server.client.request(method, address, headers=BEARER).status_code == 204
    server.put("/v1/experts/mine/files/a.safetensors", b"a")
    assert server.client.post("/v1/experts/mine/commit", json=body, headers=BEARER).status_code == 201


def test_a_commit_that_lists_something_else_changes_nothing(server: Server) -> None:
    server.put("/v1/experts/mine/files/a.safetensors", b"a")
    good, bad = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()
    for files, named in (
        ({}, "a.safetensors"),
        ({"a.safetensors": bad}, "a.safetensors"),
        ({"a.safetensors": good, "b.safetensors": bad}, "b.safetensors"),
    ):
        listed = [{"name": name, "sha256": digest} for name, digest in files.items()]
        answer = server.client.post("/v1/experts/mine/commit", json={"files": listed}, headers=BEARER)
        assert (answer.status_code, answer.json()["reason"]) == (409, "upload_unfinished")
        assert named in answer.json()["error"]
    for body in (b"{", b"[]", b'{"files": [1]}', b'{"files": {"a": "b"}}', b"[" * 100_000):
        answer = server.client.post("/v1/experts/mine/commit", content=body, headers=BEARER)
        assert (answer.status_code, answer.json()["reason"]) == (400, "bad_list"), body[:20]
    assert server.inside() == []
    assert server.client.post("/v1/experts/mine/commit", content=bytes(2 << 20), headers=BEARER).status_code == 413
    assert server.client.post("/v1/experts/mine/commit", headers=BEARER).status_code == 201


def test_an_upload_can_be_abandoned(server: Server) -> None:
    server.put("/v1/experts/mine/files/a.safetensors", b"a")
    answer = server.client.delete("/v1/experts/mine", headers=BEARER)
    assert (answer.status_code, answer.content, server.left()) == (204, b"", [])
    for method, path in (("DELETE", "/v1/experts/mine"), ("POST", "/v1/experts/mine/commit")):
        answer = server.client.request(method, path, headers=BEARER)
        assert (answer.status_code, answer.json()["reason"]) == (404, "upload_missing")


def test_what_lies_in_the_inbox_cannot_be_deleted_or_overwritten(server: Server) -> None:
    (server.home.inbox / "mine.safetensors").write_bytes(b"a trainer's")
    (server.home.inbox / "folder").mkdir()
    for path in (PATH, "/v1/experts/folder/files/a.safetensors"):
        answer = server.put(path)
        assert (answer.status_code, answer.json()["reason"]) == (409, "upload_taken")
        assert server.client.delete(path.partition("/files")[0], headers=BEARER).status_code == 404
    assert (server.home.inbox / "mine.safetensors").read_bytes() == b"a trainer's"
    assert server.left() == []


@pytest.mark.parametrize("there", ["file", "folder"])
def test_a_name_that_is_taken_meanwhile_is_left_alone(server: Server, there: str) -> None:
    path = server.home.inbox / "mine.safetensors"

    def body() -> Iterator[bytes]:
        yield DATA
        path.write_bytes(b"a trainer's") if there == "file" else path.mkdir()
        yield DATA

    answer = server.put(content=body())
    assert (answer.status_code, answer.json()["reason"]) == (409, "upload_taken")
    assert path.is_dir() if there == "folder" else path.read_bytes() == b"a trainer's"
    assert server.left() == []


def test_the_same_name_is_not_sent_twice_at_a_time(server: Server) -> None:
    with server.begin():
        for path in (PATH, PATH + "/files/a.safetensors"):
            assert server.put(path).json()["reason"] == "upload_taken"
        assert server.client.delete(PATH, headers=BEARER).json()["reason"] == "upload_unfinished"
    with server.begin("/v1/experts/mine/files/a.safetensors"):
        assert server.put("/v1/experts/mine/files/a.safetensors").json()["reason"] == "upload_taken"
        assert server.put("/v1/experts/mine/files/b.safetensors").status_code == 201
        for method, path in (("DELETE", "/v1/experts/mine"), ("POST", "/v1/experts/mine/commit")):
            answer = server.client.request(method, path, headers=BEARER)
            assert (answer.status_code, answer.json()["reason"]) == (409, "upload_unfinished")


def test_a_client_that_goes_away_leaves_nothing(server: Server) -> None:
    for path in (PATH, "/v1/experts/mine/files/a.safetensors"):
        server.begin(path).close()
        assert until(lambda: not server.left(), 10), path
    assert until(lambda: server.counted == [("broken", 0)] * 2, 5)
    assert server.inside() == []
    assert server.put().status_code == 201, "its name and its place are free again"


def test_stopping_breaks_an_upload_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server._http._server.config, "timeout_graceful_shutdown", 1)
    with server.begin():
        begun = time.monotonic()
        server._http.stop()
        assert time.monotonic() - begun < 4
    assert (server.left(), server.inside()) == ([], [])


def test_a_link_in_place_of_the_folder_is_not_followed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("not ours")
    server.home.uploads.symlink_to(tmp_path / "outside")
    assert server.put().status_code == 500
    server.home.uploads.unlink()
    server.home.uploads.mkdir()
    server.home.uploads.joinpath("other").symlink_to(tmp_path / "outside")
    assert server.put("/v1/experts/other/files/a.safetensors").status_code == 201
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["precious"]


def test_without_a_token_nothing_is_taken(line: "Line", readiness: "Readiness") -> None:
    server = Server(line, readiness, write_token="")
    try:
        for method, path in (("PUT", PATH), ("PUT", "/v1/experts/a/files/b"), ("POST", "/v1/experts/a/commit")):
            for headers in ({}, BEARER, {"Authorization": "Bearer x"}):
                answer = server.client.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["reason"]) == (403, "uploads_off"), path
                assert "http.write_token_file" in answer.json()["hint"]
    finally:
        server.close()
    assert server.inside() == []


def test_a_client_that_stalls_is_dropped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.uploads.stall_seconds = 0.3
    monkeypatch.setattr(upload_routes, "LINGER_SECONDS", 0.3)
    with server.begin() as connection:
        answer = b"".join(iter(lambda: connection.recv(10_000), b""))  # to the end: it is closed
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"stalled"' in answer
    assert server.left() == []


def test_a_client_that_trickles_is_dropped(server: Server) -> None:
    """A byte now and then is no stall, and no upload either."""
    server.uploads.stall_seconds = 0.5
    with server.begin() as connection:
        connection.settimeout(0.05)
        deadline = time.monotonic() + 10
        answer = b""
        while not answer and time.monotonic() < deadline:
            connection.send(b"x" * 10)
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_slow_but_honest_upload_is_taken(server: Server) -> None:
    server.uploads.stall_seconds = 0.3

    def body() -> Iterator[bytes]:
        for _ in range(20):
            time.sleep(0.05)
            yield b"x" * 1000

    assert server.put(content=body()).status_code == 201


def test_only_so_many_at_a_time(server: Server) -> None:
    begun = [server.begin(f"/v1/experts/{i}.safetensors") for i in range(AT_ONCE)]
    answer = server.put()
    assert (answer.status_code, answer.json()["reason"]) == (503, "upload_limit")
    for connection in begun:
        connection.close()
    assert until(lambda: server.put().status_code == 201, 10)


def test_only_so_many_unfinished(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.arrivals.uploads.MOST_OPEN", 2)
    monkeypatch.setattr("daemon.arrivals.uploads.MOST_FILES", 2)
    for path in ("a/files/1", "a/files/2", "b/files/1"):
        assert server.put(f"/v1/experts/{path}", b"x").status_code == 201
    for path in ("a/files/3", "c/files/1"):
        assert server.put(f"/v1/experts/{path}", b"x").json()["reason"] == "upload_limit"


def test_what_nobody_adds_to_is_removed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("/v1/experts/mine/files/a.safetensors", b"a")
    server.uploads.tend()
    assert server.left() == ["mine", "mine/a.safetensors"]
    monkeypatch.setattr("daemon.arrivals.uploads.STALE_SECONDS", 0.0)
    with server.begin("/v1/experts/other/files/a.safetensors"):
        server.uploads.tend()
        assert server.left() == ["other", "other/.a.safetensors.part"], "it is still coming"
    assert until(lambda: server.left() == [], 10)


def test_sizes(line: "Line", readiness: "Readiness") -> None:
    server = Server(line, readiness, upload_bytes=1_500_000)
    try:
        for content in (DATA, iter([DATA[:1_000_000], DATA[:1_000_000]])):
            answer = server.put(content=content)
            assert (answer.status_code, answer.json()["reason"]) == (413, "upload_size")
        assert server.put("/v1/experts/mine/files/a", DATA[:1_000_000]).status_code == 201
        assert server.put("/v1/experts/mine/files/b", DATA[:1_000_000]).status_code == 413, "all files count together"
        assert server.put("/v1/experts/mine/files/b", DATA[:400_000]).status_code == 201
        assert server.left() == ["mine", "mine/a", "mine/b"]
    finally:
        server.close()


def test_no_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs(server.home.root)
    monkeypatch.setattr(receiving, "RESERVE_BYTES", free.f_bavail * free.f_frsize + (1 << 30))
    for content in (DATA, iter([DATA])):
        answer = server.put(content=content)
        assert (answer.status_code, answer.json()["reason"]) == (507, "upload_space")
    assert server.left() == []


@pytest.mark.parametrize("point", ["file.create", "file.sync", "folder.sync"])
def test_a_full_disk(server: Server, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    monkeypatch.setattr("daemon.disk.failpoints._passes", {})
    monkeypatch.setenv("MAINSTEM_FAILPOINT", f"{point}=enospc")
    answer = server.put()
    assert (answer.status_code, answer.json()["reason"]) == (507, "upload_space")
    assert server.left() == []
    assert server.counted[-1][0] in ("broken", "refused")
    troubles = server.client.get("/readyz").json()["troubles"]
    assert [trouble["reason"] for trouble in troubles] == ["uploads"]
    monkeypatch.delenv("MAINSTEM_FAILPOINT")
    (server.home.inbox / "mine.safetensors").unlink(missing_ok=True)
    assert server.put().status_code == 201
    assert server.client.get("/readyz").status_code == 200, "it is over"


def test_that_an_upload_failed_is_not_told_for_ever(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy that asks /readyz no other upload would come that could clear it."""
    monkeypatch.setattr("daemon.disk.failpoints._passes", {})
    monkeypatch.setenv("MAINSTEM_FAILPOINT", "file.create=enospc")
    assert server.put().status_code == 507
    assert server.client.get("/readyz").status_code == 503
    monkeypatch.setattr("daemon.arrivals.uploads.FAILING_SECONDS", 0.0)
    assert server.client.get("/readyz").status_code == 200


def test_what_has_entered_the_inbox_is_no_upload_any_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the disk fails right after the rename: nothing may be written into what is merged."""
    assert server.put("/v1/experts/mine/files/a", b"a").status_code == 201
    monkeypatch.setattr("daemon.disk.failpoints._passes", {})
    monkeypatch.setenv("MAINSTEM_FAILPOINT", "folder.sync=enospc:2")  # the upload's own folder comes first
    assert server.client.post("/v1/experts/mine/commit", headers=BEARER).status_code == 507
    monkeypatch.delenv("MAINSTEM_FAILPOINT")
    assert server.inside() == ["mine"]
    moved = (server.home.inbox / "mine").rename(server.home.root / "moved")
    assert server.put("/v1/experts/mine/files/a", b"evil").status_code == 201
    assert (moved / "a").read_bytes() == b"a"


def test_what_could_not_be_begun_can_be_begun_again(server: Server) -> None:
    server.home.uploads.write_bytes(b"in the way")
    for _ in range(2):
        assert server.put().status_code == 500
    server.home.uploads.unlink()
    assert server.put().status_code == 201


def test_an_upload_that_broke_off_is_not_old(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("/v1/experts/mine/files/a", b"a")
    monkeypatch.setattr("daemon.arrivals.uploads.STALE_SECONDS", 3.0)
    with server.begin("/v1/experts/mine/files/b"):
        time.sleep(3.2)
    assert until(lambda: server.left() == ["mine", "mine/a"], 10)
    server.uploads.tend()
    assert server.left() == ["mine", "mine/a"]


def test_a_full_disk_leaves_no_file_that_nobody_was_told_of(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.put("/v1/experts/mine/files/a", b"a").status_code == 201
    monkeypatch.setattr("daemon.disk.failpoints._passes", {})
    monkeypatch.setenv("MAINSTEM_FAILPOINT", "folder.sync=enospc")
    assert server.put("/v1/experts/mine/files/b", b"b").status_code == 507
    assert server.left() == ["mine", "mine/a"]


def test_a_failed_sync_ends_the_daemon(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.disk.failpoints._passes", {})
    monkeypatch.setenv("MAINSTEM_FAILPOINT", "file.sync=eio")
    assert server.put().status_code == 500
    assert (server.left(), server.inside()) == ([], [])
    with pytest.raises(OSError, match="fsync failed"):
        server.uploads.tend()


def test_a_failed_sync_wakes_the_daemon_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be asleep for inbox.scan_seconds, or prepare for the next expert."""
    daemon = Service(home, quick(http={"write_token": TOKEN}))
    coming = daemon._uploads.begin("mine.safetensors", None, 3)
    coming.write(b"abc")
    assert not daemon._wake.is_set()
    monkeypatch.setattr("daemon.disk.failpoints._passes", {})
    monkeypatch.setenv("MAINSTEM_FAILPOINT", "file.sync=eio")
    with pytest.raises(OSError, match="fsync failed"):
        daemon._uploads.finish(coming, set())
    assert daemon._wake.is_set()
    daemon._uploads.drop(coming)


def test_digests(server: Server) -> None:
    for headers, status, reason in (
        ({"Content-Digest": structured(b"other")}, 400, "upload_digest"),
        ({"Repr-Digest": structured(b"other")}, 400, "upload_digest"),
        ({"Content-Digest": structured(DATA), "Repr-Digest": structured(b"other")}, 400, "upload_digest"),
        ({"Content-Digest": "sha-256=abc"}, 400, "bad_digest"),
        ({"Content-Digest": "sha-256=:AAAA:"}, 400, "bad_digest"),
        ({"Content-Encoding": "gzip"}, 415, "encoded"),
        ({"Content-Range": "bytes 0-9/10"}, 400, "partial"),
    ):
        answer = server.put(**headers)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), headers
        assert server.left() == []
    both = f"{structured(DATA, 'sha-512')}, {structured(DATA)}"
    assert server.put(**{"Content-Digest": both}).status_code == 201


def test_a_refusal_reaches_who_is_still_sending(server: Server) -> None:
    """The body is far more than a socket's buffers hold."""
    answer = server.client.put(PATH, content=bytes(32 << 20), headers={"Authorization": "Bearer wrong"})
    assert (answer.status_code, answer.headers["connection"]) == (401, "close")


def test_not_before_the_daemon_is_ready(server: Server, readiness: "Readiness") -> None:
    readiness.why_not = "recovering"
    answer = server.put()
    assert (answer.status_code, answer.json()["reason"]) == (503, "not_ready")


def test_allow_names_what_can_be_done(server: Server) -> None:
    answer = server.client.patch("/v1/experts/mine")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "PUT", "DELETE"}
    assert server.client.get("/v1/experts/abcd").json()["reason"] == "unknown_expert"


def test_many_at_once_each_its_own(server: Server) -> None:
    bodies = {f"{i}.safetensors": os.urandom(700_000) for i in range(12)}

    def send(name: str) -> None:
        assert until(lambda: server.put(f"/v1/experts/{name}", bodies[name]).status_code == 201, 30)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(send, bodies))
    assert {name: (server.home.inbox / name).read_bytes() for name in server.inside()} == bodies


def test_the_memory_does_not_grow_with_the_body(server: Server) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(300):
            yield bytes(1 << 20)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    seen, over = [resident()], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert server.put(content=body()).status_code == 201
    finally:
        over.set()
        watcher.join()
    assert max(seen) - seen[0] < 64 << 20


def write(home: Home, text: str) -> str:
    (home.root / "token").write_text(text)
    return "token"


def test_the_token_from_a_file(line: "Line") -> None:
    named = Http.model_validate({"write_token_file": write(line.home, f"  {TOKEN}\n")})
    assert Uploads(line.home, named).token == TOKEN
    assert Uploads(line.home, Http()).token is None
    for settings in (
        {"write_token_file": "nowhere"},
        {"write_token_file": write(line.home, "short")},
        {"write_token": "a token with spaces in it"},
        {"write_token": "short"},
        {"write_token": TOKEN, "write_token_file": "token"},
    ):
        with pytest.raises(BadConfig) as caught:
            Uploads(line.home, Http.model_validate(settings))
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_token_that_others_may_read_is_warned_of(line: "Line", mode: int, warned: bool) -> None:
    named = Http.model_validate({"write_token_file": write(line.home, TOKEN)})
    (line.home.root / "token").chmod(mode)
    with capture_logs() as logged:
        Uploads(line.home, named)
    path = str(line.home.root / "token")
    wanted = {"log_level": "warning", "file": path, "mode": f"{mode:04o}", "hint": f"chmod 600 {path}"}
    assert [{key: entry[key] for key in wanted} for entry in logged] == [wanted] * warned
    assert TOKEN not in str(logged)


def test_the_token_is_never_shown(
    line: "Line", readiness: "Readiness", caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    http = Http.model_validate({"write_token": TOKEN})
    assert TOKEN not in f"{http!r} {http} {http.model_dump(mode='json')} {json.dumps(http.model_dump(mode='json'))}"
    server = Server(line, readiness)
    try:
        answers = [server.put(content=b"x"), server.put(content=b"x"), server.client.get("/")]
        answers += [server.client.get(path) for path in ("/metrics", "/v1/experts", PATH)]
    finally:
        server.close()
    assert all(TOKEN not in answer.text + str(answer.headers) for answer in answers)
    logged = "".join(capfd.readouterr()) + caplog.text
    assert "uploaded" in logged and TOKEN not in logged
