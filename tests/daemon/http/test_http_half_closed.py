"""A client that closes its side of the connection once it has asked, as `nc -N` does, gets its answer."""

import hashlib
import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

LATEST = "/v1/heads/main/latest"


def asked(origin: str, request: str) -> tuple[bytes, bytes]:
    """(the answer's head, its body), read until the server closes; the client closes its side at once."""
    host, port = origin.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request.encode())
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


def get(path: str, *headers: str) -> str:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""])


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/", "/metrics", "/v1/heads", "/v1/heads/main/versions/0"])
def test_small_answers(line: "Line", origin: str, path: str) -> None:
    head, body = asked(origin, get(path))
    assert head.startswith(b"HTTP/1.1 200 ")
    assert f"content-length: {len(body)}".encode() in head.lower() and body


def test_of_the_oldest_protocol(origin: str) -> None:
    head, body = asked(origin, "GET /livez HTTP/1.0\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and body == b'{"live":true}'


def test_a_file_whole_and_in_part(line: "Line", origin: str) -> None:
    """Longer than all buffers on the way."""
    weights = os.urandom(24 << 20)
    line.publish(weights)
    path = "/v1/heads/main/versions/1/files/model.safetensors"
    head, body = asked(origin, get(path))
    assert head.startswith(b"HTTP/1.1 200 ")
    assert hashlib.sha256(body).digest() == hashlib.sha256(weights).digest()
    head, body = asked(origin, get(path, "Range: bytes=5-9"))
    assert head.startswith(b"HTTP/1.1 206 ") and body == weights[5:10]


def test_who_waits_is_answered_at_once(line: "Line", origin: str) -> None:
    """A client that has gone for good looks the same, and must not hold a place."""
    begun = time.monotonic()
    head, _ = asked(origin, get(f"{LATEST}?wait_for=9&timeout=60"))
    assert head.startswith(b"HTTP/1.1 204 ")
    assert time.monotonic() - begun < 8


def test_half_a_request_is_not_waited_for(origin: str) -> None:
    for half in ("", "GET /livez HT", "GET /livez HTTP/1.1\r\nHost: x\r\n"):
        with suppress(ConnectionResetError):
            assert asked(origin, half) == (b"", b""), half
