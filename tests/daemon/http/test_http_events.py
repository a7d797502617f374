"""Server-sent events: what is said at once, when something changes, and how a stream ends."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from daemon.disk import durable
from daemon.home.presence import Presence
from daemon.http import HttpServer, create_app, events
from daemon.http.answers import Problem
from daemon.http.events import Events
from registry.reader import Reader
from registry.records import Deed, NewIntervention

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

Told = Iterator[tuple[str, dict[str, object]]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(events, "BEAT_SECONDS", 0.5)


def told(answer: httpx.Response) -> Told:
    """The events of a stream, and its comments as events without a name."""
    name = ""
    for line in answer.iter_lines():
        kind, _, text = line.partition(": ")
        if kind == "event":
            name = text
        elif kind == "data":
            yield name, json.loads(text)
        elif kind == "":
            yield "", {}


def the(name: str, found: Told) -> dict[str, object]:
    """The next event of that name."""
    return next(said for kind, said in found if kind == name)


def test_of_many_who_come_at_once_no_more_are_let_in_than_may_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ask before the first of them is told anything; then one is gone before that, and another may listen."""
    monkeypatch.setattr(events, "MOST_LISTENERS", 2)

    async def gone(_: object = None) -> Message:
        raise OSError("the client is gone")

    async def burst() -> None:
        here = Events(dict)
        state = {"waiters": 9, "stopping": asyncio.Event(), "hung_up": asyncio.Event()}
        scope = {"type": "http", "method": "GET", "path": "/v1/events", "headers": [], "state": state}
        asked = [here.answer(Request(scope, gone)) for _ in range(5)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        streams = [one for one in answers if isinstance(one, Response)]
        assert len(streams) == 2
        assert [one.status for one in answers if isinstance(one, Problem)] == [503] * 3
        with pytest.raises((OSError, ClientDisconnect, ExceptionGroup)):
            await streams[0](scope, gone, gone)
        await here.answer(Request(scope, gone))
        with pytest.raises(Problem):
            await here.answer(Request(scope, gone))

    asyncio.run(burst())


def test_what_goes_on_is_said_at_once_and_when_it_changes(line: "Line", client: httpx.Client) -> None:
    with client.stream("GET", "/v1/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no" and "no-cache" in answer.headers["cache-control"]
        found = told(answer)
        first = the("condition", found)
        assert (first["doing"], first["pill"], first["tone"], first["expert"]) == (
            "no daemon",
            "no daemon",
            "bad",
            None,
        )
        assert the("home", found)["heads"] == [
            {"name": name, "live": 0, "newest": 0, "frozen": False} for name in ("main", "init")
        ]
        assert next(found) == ("", {}), "nothing has changed: only a comment comes"
        line.publish(b"one")
        said = the("home", found)
        assert said["experts"] == {"merged": 1, "duplicate": 0, "quarantined": 0, "withdrawn": 0}
        lock, presence = durable.lock(line.home.lock), Presence(line.home)
        presence.starts()
        presence.watches()
        assert the("condition", found)["pill"] in ("idle", "recovering")
        (line.home.inbox / "next.safetensors").touch()
        (line.home.inbox / "later").touch()
        with presence.merging("next.safetensors"):
            presence.progresses(0.43)
            while (now := the("condition", found))["doing"] != "merging":
                pass
            assert (now["expert"], now["pill"], now["tone"]) == (
                "next.safetensors",
                "merging next.safetensors 43%",
                "busy",
            )
            assert sorted(one["name"] for one in now["waiting"]) == ["later", "next.safetensors"]  # type: ignore[attr-defined]
            assert now["waiting_count"] == 2 and str(line.home.root) not in json.dumps(now)
        line.store.turn("main", 0, NewIntervention(Deed.ROLLBACK, "ada", head="main", version=0), "worse")
        assert the("home", found)["heads"][0] == {"name": "main", "live": 0, "newest": 1, "frozen": True}  # type: ignore[index]
        os.close(lock)


def test_only_so_many_may_listen(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_LISTENERS", 1)
    assert client.head("/v1/events").headers["content-type"].startswith("text/event-stream")
    with client.stream("GET", "/v1/events") as one:
        found = told(one)  # to be kept: a stream that nobody reads any more is closed
        assert the("condition", found)
        refused = client.get("/v1/events")
        assert (refused.status_code, refused.json()["reason"]) == (503, "busy") and refused.headers["retry-after"]
    for _ in range(200):  # its place is free once the server has seen it go
        with client.stream("GET", "/v1/events") as again:
            if again.status_code == 200:
                found = told(again)
                assert the("condition", found)
                return
        time.sleep(0.05)
    pytest.fail("its place is still taken")


def test_a_server_that_stops_ends_the_stream(line: "Line", tmp_path: Path) -> None:
    with Reader.open(line.home.registry) as reader:
        server = HttpServer(create_app(line.home, reader, CollectorRegistry(), lambda: None), "127.0.0.1", 0)
        host, port = server.start()
        with httpx.stream("GET", f"http://{host}:{port}/v1/events", trust_env=False, verify=False) as answer:
            found = told(answer)
            the("home", found)
            stopping = Thread(target=server.stop)
            stopping.start()
            assert [name for name, _ in found if name == "home"] == [], "it ends as it should, and is not cut off"
        stopping.join()
