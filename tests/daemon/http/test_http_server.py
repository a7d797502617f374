"""Starting and stopping the server, and what importing it costs."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from daemon.errors import BadConfig
from daemon.http import HttpServer, base_url, server
from daemon.http.connections import Connection

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line


def hello(_: Request) -> Response:
    return PlainTextResponse("hello")


def fails(_: Request) -> Response:
    raise ZeroDivisionError


APP = Starlette(routes=[Route("/", hello), Route("/fails", fails)])


def test_it_starts_on_a_free_port_and_stops() -> None:
    http = HttpServer(APP, "127.0.0.1", 0)
    host, port = http.start()
    assert httpx.get(f"http://{host}:{port}/", trust_env=False).text == "hello"
    http.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=1)


def test_a_port_in_use_is_a_clear_error() -> None:
    with HttpServer(APP, "127.0.0.1", 0) as (host, port):
        with pytest.raises(BadConfig, match=f"{host}:{port}.*in use") as caught:
            HttpServer(APP, host, port).start()
        assert "port" in caught.value.hint


def test_a_body_does_not_wait_for_the_head_to_be_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def made(self: Connection, transport: asyncio.Transport) -> None:
        found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        before(self, transport)

    before = Connection.connection_made
    monkeypatch.setattr(Connection, "connection_made", made)
    with HttpServer(APP, "127.0.0.1", 0) as (host, port):
        httpx.get(f"http://{host}:{port}/", trust_env=False, verify=False)
    assert len(found) == 1 and found[0]


def test_a_host_that_is_not_ours_is_a_clear_error() -> None:
    with pytest.raises(BadConfig, match="cannot listen"):
        HttpServer(APP, "192.0.2.1", 0).start()


def test_the_port_can_be_used_again_at_once() -> None:
    with HttpServer(APP, "127.0.0.1", 0) as (host, port):
        httpx.get(f"http://{host}:{port}/", trust_env=False)
    with HttpServer(APP, host, port) as bound:
        assert bound == (host, port)


def test_stop_without_start_is_harmless() -> None:
    HttpServer(APP, "127.0.0.1", 0).stop()


def test_stopping_does_not_wait_for_a_reader_that_stalls(
    line: "Line", origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fixture's server is stopped by the fixture: here a second one, with a short grace, over the same home.
    from prometheus_client import CollectorRegistry

    from daemon.http import create_app
    from registry.reader import Reader

    monkeypatch.setattr(server, "GRACE_SECONDS", 1)
    line.publish(os.urandom(1 << 20) * 32)
    with Reader.open(line.home.registry) as reader:
        http = HttpServer(create_app(line.home, reader, CollectorRegistry(), lambda: None), "127.0.0.1", 0)
        host, port = http.start()
        with socket.create_connection((host, port), timeout=10) as connection:
            connection.sendall(b"GET /v1/heads/main/versions/1/files/model.safetensors HTTP/1.1\r\nHost: x\r\n\r\n")
            connection.recv(1000)
            begun = time.monotonic()
            http.stop()
            assert time.monotonic() - begun < 4


def test_a_signal_ends_the_wait() -> None:
    http = HttpServer(APP, "127.0.0.1", 0)
    host, port = http.start()
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    http.wait_for_signal()
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=1)


def test_a_fault_is_logged_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with (
        HttpServer(APP, "127.0.0.1", 0) as (host, port),
        caplog.at_level(logging.WARNING),
    ):
        assert httpx.get(f"http://{host}:{port}/fails", trust_env=False).status_code == 500
        assert httpx.get(f"http://{host}:{port}/", trust_env=False).text == "hello"
    assert [record.name for record in caplog.records] == ["uvicorn.error"]


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, daemon.http; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_ipv6_address_is_written_as_it_is_typed() -> None:
    assert base_url("::1", 8765) == "http://[::1]:8765/"
    assert base_url("127.0.0.1", 80) == "http://127.0.0.1:80/"
