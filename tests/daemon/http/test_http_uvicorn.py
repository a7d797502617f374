"""What we rely on in uvicorn beyond what it documents, one by one: a new release that changes it fails here, by name.

Used in `daemon/http/connections.py` (the protocol) and `daemon/http/server.py` (the server). pyproject.toml allows the
releases that this was tried with; to allow a newer one, run this file with it.
"""

import asyncio
import inspect
import os
import re
import socket
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from daemon.http import HttpServer
from daemon.http.connections import Connection
from tests.daemon.processes import until


@pytest.mark.parametrize("name", ["uvicorn", "starlette"])
def test_only_releases_that_were_tried_are_allowed(name: str) -> None:
    listed = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = [line for line in listed if line.startswith(name)]
    assert re.search(r"<\d", wanted), f"{wanted}: no upper bound"


class Exchange:
    """A server whose application waits until it is let go on, one connection to it, and the protocol that has it."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.scopes: list[Scope] = []
        self.server = HttpServer(self.app, "127.0.0.1", 0)
        self.address = self.server.start()
        self.client = socket.create_connection(self.address, timeout=10)
        assert until(lambda: self.state.connections, 30), (
            "uvicorn: ServerState.connections does not have a new connection"
        )
        (self.protocol,) = self.state.connections

    @property
    def state(self) -> Any:
        return self.server._server.server_state

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        while not self.go_on.is_set():
            await asyncio.sleep(0.01)
        await PlainTextResponse("hello")(scope, receive, send)

    def close(self) -> None:
        self.go_on.set()
        self.client.close()
        self.server.stop()


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    exchange = Exchange()
    yield exchange
    exchange.close()


def test_the_protocol_is_made_by_whatever_config_http_is(exchange: Exchange) -> None:
    """Config(http=...) may be any callable, and is called with keywords."""
    assert isinstance(exchange.protocol, Connection)
    names = set(inspect.signature(H11Protocol.__init__).parameters)
    assert {"config", "server_state", "app_state", "_loop"} <= names


def test_the_protocol_before_during_and_after_a_request(exchange: Exchange) -> None:
    protocol = exchange.protocol
    assert protocol.loop.is_running(), "H11Protocol.loop is the event loop"
    assert protocol.transport.get_write_buffer_size() == 0, "H11Protocol.transport is asyncio's"
    assert protocol.cycle is None, "H11Protocol.cycle is None before the first request"
    exchange.client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nab")
    assert until(lambda: exchange.scopes, 30)
    cycle = protocol.cycle
    assert cycle.response_complete is False, "cycle.response_complete is False while the answer is under way"
    assert cycle.more_body is True, "cycle.more_body is True while some of the request is to come"
    assert cycle.keep_alive is True, "cycle.keep_alive says whether the connection stays"
    exchange.client.sendall(b"c")
    assert until(lambda: cycle.more_body is False, 30), "cycle.more_body is False once the request is whole"
    exchange.go_on.set()
    assert exchange.client.recv(1000).startswith(b"HTTP/1.1 200")
    assert until(lambda: cycle.response_complete, 30), "cycle.response_complete is True after the answer"
    assert protocol.cycle is cycle, "H11Protocol.cycle stays that of the last request"
    exchange.client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert until(lambda: protocol.cycle is not cycle, 30), "each request has a cycle of its own"


def test_what_is_put_into_the_cycles_scope_reaches_the_application(exchange: Exchange) -> None:
    exchange.client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert until(lambda: exchange.scopes, 30)
    hung_up = exchange.scopes[0]["state"]["hung_up"]
    assert exchange.protocol.cycle.scope["state"]["hung_up"] is hung_up, (
        "cycle.scope is what the application is called with"
    )
    exchange.client.shutdown(socket.SHUT_WR)
    assert until(hung_up.is_set, 30), "eof_received of the protocol is called, and its True keeps the connection"
    exchange.go_on.set()
    answer = b"".join(iter(lambda: exchange.client.recv(1000), b""))
    assert answer.endswith(b"hello"), "cycle.keep_alive = False closes the connection after the answer"


def test_the_server(exchange: Exchange) -> None:
    server = exchange.server._server
    assert server.started is True and server.should_exit is False
    assert list(inspect.signature(uvicorn.Server.shutdown).parameters) == ["self", "sockets"]
    assert inspect.iscoroutinefunction(uvicorn.Server.shutdown)
    assert list(inspect.signature(uvicorn.Server.run).parameters) == ["self", "sockets"]
    exchange.client.close()
    assert until(lambda: not exchange.state.connections, 30), "ServerState.connections forgets one that has ended"


def test_stopping_lets_an_answer_end_and_then_drops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout_graceful_shutdown` is how long `shutdown` waits, and it returns even if an answer has not ended."""
    monkeypatch.setattr("daemon.http.server.GRACE_SECONDS", 1)
    exchange = Exchange()
    exchange.client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert until(lambda: exchange.scopes, 30)
    exchange.server.stop()
    assert not exchange.state.connections
    exchange.close()


def streaming(body: Callable[[Request], Any]) -> HttpServer:
    def endpoint(request: Request) -> Response:
        return StreamingResponse(body(request))

    return HttpServer(Starlette(routes=[Route("/", endpoint)]), "127.0.0.1", 0)


def test_an_answer_waits_while_the_client_takes_nothing_and_ends_when_it_goes() -> None:
    """`send` waits for the transport (flow control), and starlette cancels a stream whose client has gone: a file that
    is sent would otherwise be read into memory, and stay open.
    """
    sent: list[int] = []
    ended = threading.Event()

    async def body(_: Request) -> Any:
        try:
            while True:
                sent.append(1)
                yield os.urandom(1 << 16)
                await asyncio.sleep(0)  # as reading a file does; a stream that never waits cannot be cancelled
        finally:
            ended.set()

    with streaming(body) as address, socket.create_connection(address, timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert until(lambda: sent, 30)
        last = -1
        while last != len(sent):
            last = len(sent)
            time.sleep(0.3)
        assert last < 1000, "an answer goes on without being taken"
        client.close()
        assert ended.wait(10), "the stream goes on without a client"


def test_pipelined_requests_are_answered_one_after_the_other(exchange: Exchange) -> None:
    exchange.go_on.set()
    exchange.client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
    answers = b""
    while answers.count(b"hello") < 3:
        piece = exchange.client.recv(10_000)
        assert piece
        answers += piece
