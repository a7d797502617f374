"""Waiting for a version: answered when it is there, however it came, and never at the cost of a thread."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

import httpx
import pytest
from prometheus_client import CollectorRegistry

from daemon.http import HttpServer, create_app, waiting
from registry.errors import Damaged
from registry.reader import Reader
from registry.records import Head
from tests.daemon.processes import running, until

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

LATEST = "/v1/heads/main/latest"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def wait(origin: str, version: int, seconds: float) -> tuple[int, str, float]:
    """(status, where to, seconds it took)."""
    begun = time.monotonic()
    answer = httpx.get(f"{origin}{LATEST}?wait_for={version}&timeout={seconds}", trust_env=False, timeout=30)
    assert answer.headers["cache-control"] == "no-cache"
    return answer.status_code, answer.headers.get("location", ""), time.monotonic() - begun


def test_what_is_there_is_answered_at_once(line: "Line", origin: str) -> None:
    line.publish(b"one")
    for version in (0, 1):
        status, location, seconds = wait(origin, version, 20)
        assert (status, location) == (307, "versions/1")
        assert seconds < 5


def test_the_time_runs_out(origin: str) -> None:
    status, location, seconds = wait(origin, 1, 0.4)
    assert (status, location) == (204, "")
    assert 0.4 <= seconds < 5
    assert wait(origin, 1, 0)[0] == 204


def test_a_version_that_comes_is_answered(line: "Line", origin: str, pool: ThreadPoolExecutor) -> None:
    first, second = pool.submit(wait, origin, 1, 20), pool.submit(wait, origin, 2, 20)
    time.sleep(0.3)
    line.publish(b"one")
    status, location, seconds = first.result()
    assert (status, location) == (307, "versions/1")
    assert seconds < 10
    assert not second.done()
    line.publish(b"two")
    assert second.result()[:2] == (307, "versions/2")


def test_who_says_what_it_has_hears_of_any_other(line: "Line", client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    assert client.get(f"{LATEST}?have=0&timeout=0.1").status_code == 204
    assert client.get(f"{LATEST}?have=7&timeout=20").headers["location"] == "versions/0"
    held = pool.submit(client.get, f"{LATEST}?have=0&timeout=20")
    line.publish(b"one")
    assert held.result().headers["location"] == "versions/1"
    assert client.get(f"{LATEST}?have=1&wait_for=2&timeout=0.1").status_code == 204
    assert client.get(f"{LATEST}?have=1&wait_for=1").status_code == 307


def test_another_head_s_version_wakes_nobody_else(line: "Line", client: httpx.Client, origin: str) -> None:
    line.publish(b"one")
    assert client.get("/v1/heads/init/latest?wait_for=1").headers["location"] == "versions/1"
    assert client.get("/v1/heads/init/latest?wait_for=2&timeout=0.3").status_code == 204


def test_many_wait_in_one_place(
    line: "Line", origin: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    heads = Reader.heads

    def counted(self: Reader) -> list[Head]:
        asked.append(threading.current_thread().name)
        return heads(self)

    monkeypatch.setattr(Reader, "heads", counted)
    begun = time.monotonic()
    waiters = [pool.submit(wait, origin, 1, 20) for _ in range(40)]
    time.sleep(1.5)
    looks = (time.monotonic() - begun) / waiting.LOOK_SECONDS
    assert 1 <= len(asked) <= looks + 3, "the registry is asked once for all"
    workers = [thread for thread in threading.enumerate() if "AnyIO" in thread.name]
    assert len(workers) < 40
    line.publish(b"one")
    assert {waiter.result()[:2] for waiter in waiters} == {(307, "versions/1")}
    before = len(asked)
    time.sleep(3 * waiting.LOOK_SECONDS)
    assert len(asked) <= before + 2, "nobody waits, nobody asks"


def test_too_many_are_told(origin: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_WAITERS", 2)
    url = f"{origin}{LATEST}?wait_for=1&timeout=3"
    asked = [pool.submit(httpx.get, url, trust_env=False, timeout=30) for _ in range(3)]
    *waited, told = sorted((answer.result() for answer in asked), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in waited] == [204, 204]
    assert (told.status_code, told.json()["reason"]) == (503, "busy")
    assert int(told.headers["retry-after"]) > 0
    assert wait(origin, 1, 0)[0] == 204, "their places are free again"


def test_who_goes_away_frees_the_place(line: "Line", origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_WAITERS", 1)
    host, port = origin.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"GET {LATEST}?wait_for=9&timeout=300 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert until(lambda: _status(origin) == 503, 5)
    assert until(lambda: _status(origin) == 204, 5)


def _status(origin: str) -> int:
    return httpx.get(f"{origin}{LATEST}?wait_for=1&timeout=0", trust_env=False, timeout=10).status_code


def test_stopping_answers_who_waits(line: "Line", pool: ThreadPoolExecutor) -> None:
    with Reader.open(line.home.registry) as reader:
        server = HttpServer(create_app(line.home, reader, CollectorRegistry(), lambda: None), "127.0.0.1", 0)
        host, port = server.start()
        held = pool.submit(wait, f"http://{host}:{port}", 1, 25)
        time.sleep(0.5)
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < 3
        assert held.result()[0] == 204


def test_a_registry_that_breaks_is_told_to_who_waits(
    origin: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = pool.submit(httpx.get, f"{origin}{LATEST}?wait_for=1&timeout=20", trust_env=False, timeout=30)
    time.sleep(0.5)

    def breaks(*_: object) -> NoReturn:
        raise Damaged("a page is torn", "restore it")

    monkeypatch.setattr(Reader, "heads", breaks)
    monkeypatch.setattr(Reader, "head", breaks)
    answer = held.result(timeout=10)
    assert (answer.status_code, answer.json()["reason"]) == (503, "registry")


@pytest.mark.parametrize(
    "query",
    [
        *(f"wait_for={n}" for n in ("", "x", "-1", "1.5", "+1", "9" * 13, "1%00", "٣")),
        *(f"wait_for=1&timeout={s}" for s in ("", "x", "-1", "301", "1e2", "inf", "nan", "9" * 400, ".5")),
        *(f"have={n}" for n in ("", "x", "-1")),
        "timeout=5",
    ],
)
def test_bad_parameters(client: httpx.Client, query: str) -> None:
    answer = client.get(f"{LATEST}?{query}")
    assert (answer.status_code, answer.json()["reason"]) == (400, "bad_query")
    assert answer.json()["hint"]


def test_an_unknown_head_is_not_waited_for(client: httpx.Client) -> None:
    assert client.get("/v1/heads/none/latest?wait_for=1").status_code == 404


def test_serve_sees_what_another_process_publishes(line: "Line", pool: ThreadPoolExecutor) -> None:
    """`mainstem serve` is a process of its own; the version is committed by this one."""
    with running("serve", "--home", line.home.root, "--port", "0") as serving:
        held = pool.submit(wait, serving.origin, 1, 25)
        time.sleep(0.5)
        assert not held.done()
        line.publish(b"one")
        status, location, seconds = held.result()
        assert (status, location) == (307, "versions/1")
        assert seconds < 15
        again = pool.submit(wait, serving.origin, 2, 60)
        time.sleep(0.5)
        assert serving.stop() == 0
        assert again.result()[0] == 204
