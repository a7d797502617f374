"""`mainstem health`: the exit status that a probe gets, and the line that says why."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from daemon.disk import durable
from daemon.home.health import Trouble
from daemon.home.presence import Presence
from daemon.layout import Home
from tests.daemon.processes import forked, forked_each, running, until


@pytest.fixture
def presence(home: Home) -> Iterator[Presence]:
    """What a daemon without HTTP says of itself."""
    fd, presence = durable.lock(home.lock), Presence(home)
    presence.starts()
    yield presence
    presence.ends()
    os.close(fd)


def test_no_daemon_and_no_home_are_not_healthy(home: Home, tmp_path: Path) -> None:
    both = forked_each([("health", home.root), ("health", "--live", home.root), ("health", tmp_path / "nothing")])
    assert [one.returncode for one in both] == [1, 1, 1]
    assert [one.stdout for one in both[:2]] == ["not healthy: no daemon runs: start `mainstem run`\n"] * 2
    assert "is not a mainstem home" in both[2].stdout


def test_a_daemon_without_http_is_asked_by_what_it_says_of_itself(home: Home, presence: Presence) -> None:
    recovering = forked_each([("health", home.root), ("health", "--live", home.root)])
    assert [one.returncode for one in recovering] == [1, 0]
    presence.watches()
    assert forked("health", home.root).stdout == "healthy\n"
    presence.wrong([Trouble("disk_full", "the disk is full", "make room")])
    full = forked_each([("health", home.root, "--json"), ("health", "--live", home.root)])
    assert [one.returncode for one in full] == [1, 0]
    assert json.loads(full[0].stdout) == {"healthy": False, "live": False, "why": "the disk is full (make room)"}


def test_a_daemon_with_http_is_asked_there(home: Home) -> None:
    with running("run", "--home", home.root, "--host", "0.0.0.0", "--port", "0") as daemon:
        assert until(lambda: daemon.get("/readyz").status_code == 200, 60)
        assert forked("health", home.root).stdout == "healthy\n"
        home.inbox.rename(home.root / "elsewhere")
        assert until(lambda: daemon.get("/readyz").status_code == 503, 30)
        gone = forked_each([("health", home.root), ("health", "--live", "--home", home.root)])
        assert [one.returncode for one in gone] == [1, 0]
        assert "the inbox is gone" in gone[0].stdout


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"/mainstem/livez": b"{}", "/mainstem/readyz": b"<html>"}[self.path]
        self.send_response(200 if self.path.endswith("livez") else 502)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_behind_a_proxy_is_asked_by_its_address() -> None:
    with HTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/mainstem/"
        found = forked_each([("health", "--url", url, "--live"), ("health", "--url", url)])
        server.shutdown()
    nobody, wrong = forked_each([("health", "--url", url), ("health", "--url", "http://a:99999999")])
    assert [one.returncode for one in (*found, nobody, wrong)] == [0, 1, 1, 2]
    assert found[1].stdout == "not healthy: the server answers 502\n"
    assert "does not answer" in nobody.stdout
