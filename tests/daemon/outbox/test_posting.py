"""One attempt to tell a URL: signed, to public addresses alone unless allowed, within its time, and not redirected."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daemon.layout import Home
from daemon.outbox import posting
from daemon.outbox.posting import Posting, is_public, signature
from daemon.pull.client import Connection, Origin
from daemon.sections import Webhook
from tests.daemon.outbox.receiver import KEY, SECRET, Receiver, verified

OK = b"HTTP/1.1 200 OK\r\n"
OTHER = b"another secret of at least 24 bytes"


def to(url: str, keys: tuple[bytes, ...] = (KEY,), **more: Any) -> Posting:
    webhook = Webhook.model_validate({"url": url, "secret": SECRET, "allow_private": True, **more})
    return Posting(Home(Path("home")), webhook, keys)


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """Made with the library `standardwebhooks` 1.1.0."""
    assert signature([KEY], "msg_1", "1700000000", b'{"a": 1}') == "v1,BkMd8dqbxer7jqXt9Cs1PRXQkwb2OuNQP/SAT1E+bkc="


def test_what_is_sent_can_be_verified_with_any_of_its_secrets(receiver: Receiver) -> None:
    answer = to(receiver.url, (KEY, OTHER)).post("msg_1", b'{"type": "published"}')
    assert answer.delivered and answer.text == "204 No Content"
    (request,) = receiver.wait(1)
    assert (request.path, request.body, request.message) == ("/told?who=me", b'{"type": "published"}', "msg_1")
    assert request.headers["content-type"] == "application/json"
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 100
    assert verified(request, KEY) and verified(request, OTHER) and not verified(request, b"x" * 32)


@pytest.mark.parametrize("status", [200, 204, 299, 300, 400, 410, 500, 503])
def test_only_a_status_from_200_to_299_is_an_acknowledgement(receiver: Receiver, status: int) -> None:
    receiver.answer = lambda _: (status, "" if status == 204 else "one\nline \x1b[1m")
    answer = to(receiver.url).post("msg_1", b"{}")
    assert answer.delivered == (status < 300)
    assert answer.text.startswith(str(status)) and answer.text.isprintable()
    assert answer.again_seconds == (77 if status == 503 else None)


def test_a_redirection_is_not_followed(receiver: Receiver) -> None:
    receiver.answer = lambda _: (302, f"location: {receiver.url}")
    assert not to(receiver.url).post("msg_1", b"{}").delivered
    receiver.wait(1)


def test_nobody_is_asked_in_a_private_network_unless_that_is_allowed(receiver: Receiver) -> None:
    answer = to(receiver.url, allow_private=False).post("msg_1", b"{}")
    assert not answer.delivered and "127.0.0.1" in answer.text and "allow_private" in answer.text
    assert not receiver.requests


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when it is first asked for, and private ever after."""
    port, asked = int(receiver.url.split(":")[2].split("/")[0]), []

    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[Any, ...]]:
        asked.append(host)
        address = "203.0.113.1" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connected: list[object] = []

    def connect(_: socket.socket, address: object) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(posting, "is_public", lambda address: address == "203.0.113.1")
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert not to("http://rebinding.example/", allow_private=False).post("msg_1", b"{}").delivered
    assert asked == ["rebinding.example"] and connected == [("203.0.113.1", port)]


@pytest.mark.parametrize(("url", "port"), [("http://[2606:4700::1111]/", 80), ("https://[2606:4700::1111]/", 443)])
def test_the_end_of_an_ipv6_address_is_no_port(monkeypatch: pytest.MonkeyPatch, url: str, port: int) -> None:
    asked: list[object] = []

    def getaddrinfo(*words: object, **_: object) -> None:
        asked.append(words[:2])
        raise OSError("not here")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert not to(url).post("msg_1", b"{}").delivered
    assert asked == [("2606:4700::1111", port)]
    assert Connection(Origin.of(url))._http.port == port


def test_a_name_with_many_addresses_has_no_more_time_than_one_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"203.0.113.{n}", 80)) for n in range(100)]
    connected: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        connected.append(address)
        time.sleep(self.gettimeout() or 0)
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket.socket, "connect", connect)
    answer = to("http://many.example/", timeout_seconds=0.05).post("msg_1", b"{}")
    assert answer.text == "no answer within 0.05 s" and len(connected) == 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((one, True) for one in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")),
        *((one, False) for one in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")),
        *((one, False) for one in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1")),
        *((one, False) for one in ("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1")),
        *((one, False) for one in ("64:ff9b::7f00:1", "2002:7f00:1::")),
        *((one, False) for one in ("fec0::1", "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::7f00:1")),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@contextmanager
def answering(*pieces: bytes, pause: float = 0.0) -> Iterator[str]:
    """A server that takes a connection, sends these pieces with a pause after each, and holds it open."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        over = threading.Event()

        def serve() -> None:
            taken, _ = listener.accept()
            with taken:
                for piece in pieces:
                    try:
                        taken.sendall(piece)
                    except OSError:
                        return
                    over.wait(pause)
                over.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize("pieces", [(), (OK, *([b"a: b\r\n"] * 100)), (OK + b"Content-Length: 99\r\n\r\n",)])
def test_who_does_not_answer_in_time_has_not_answered(pieces: tuple[bytes, ...]) -> None:
    """Whether nothing comes, a little at a time, or less than was promised."""
    with answering(*pieces, pause=0.1) as url:
        answer = to(url, timeout_seconds=0.3).post("msg_1", b"{}")
    assert not answer.delivered and answer.text == "no answer within 0.3 s"


@pytest.mark.parametrize("pieces", [(b"hello\r\n",), (OK + b"a: b\r\n" * 200,), (b"\xff" * 100_000,)])
def test_what_is_no_http_is_no_answer(pieces: tuple[bytes, ...]) -> None:
    with answering(*pieces) as url:
        answer = to(url, timeout_seconds=5).post("msg_1", b"{}")
    assert not answer.delivered and answer.text.isprintable() and len(answer.text) <= 500


def test_a_name_that_nobody_has_and_a_port_where_nobody_listens_are_no_answer() -> None:
    assert not to("http://nobody.invalid/").post("msg_1", b"{}").delivered
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        answer = to(f"http://127.0.0.1:{unused.getsockname()[1]}").post("msg_1", b"{}")
    assert not answer.delivered and "refused" in answer.text


def test_an_attempt_is_cut_short() -> None:
    with answering() as url:
        post = to(url, timeout_seconds=60)
        threading.Timer(0.1, post.abort).start()
        assert not post.post("msg_1", b"{}").delivered
