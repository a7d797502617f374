"""How a command reaches the daemon, and what either is told where that goes wrong."""

import json
import os
from pathlib import Path
from threading import Thread

import pytest

from daemon.disk import durable
from daemon.errors import BadHome
from daemon.interventions import requests
from daemon.interventions.deeds import Request
from daemon.interventions.requests import Desk, ask
from daemon.layout import Home
from registry.errors import StorageFailed
from registry.records import Deed
from registry.store import Store
from tests.daemon.homes import live
from tests.daemon.processes import until

ROLLBACK = Request(Deed.ROLLBACK, "ann", "why", "main", 3)


def test_what_cannot_be_read_is_passed_over_and_the_next_one_answered(merged: Home) -> None:
    lock = durable.lock(merged.lock)
    changed: list[Request] = []
    with Store.open(merged.registry) as store:
        desk = Desk(merged, store, lambda: None, changed.append)
        for name, text in (("a.json", b"{"), ("b.json", b'{"deed": "explode"}'), ("c.json", b"[" * 100_000)):
            (merged.requests / name).write_bytes(text)
        durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
        assert ask(merged, ROLLBACK)[0] == "main/3 is live, main/4 is not"
        assert changed == [ROLLBACK] and live(merged) == 3
        with pytest.raises(BadHome, match="newer than main/3"):
            ask(merged, Request(Deed.ROLLBACK, "ann", None, "main", 4))
        desk.check()
        desk.close()
    os.close(lock)


def test_a_daemon_that_stops_first_is_told_of(merged: Home) -> None:
    """What takes long is left to the merge loop, which does not come to it here."""
    lock = durable.lock(merged.lock)
    durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
    with Store.open(merged.registry) as store:
        desk = Desk(merged, store, lambda: None, lambda _: None)
        heard: list[str] = []

        def wait() -> None:
            try:
                ask(merged, Request(Deed.WITHDRAW, "ann", experts=(1,)), say=heard.append)
            except BadHome as error:
                heard.append(str(error))

        waiting = Thread(target=wait)
        waiting.start()
        assert until(lambda: desk.waiting, 10)
        assert until(lambda: heard, 10) == ["waiting for the expert that is being merged"]
        desk.close()
        os.close(lock)
        waiting.join()
    assert heard[1:] == ["the daemon stopped before it answered"]
    assert not merged.requests.exists()


def test_a_disk_that_fails_ends_the_daemon(merged: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[str]:
        raise StorageFailed("the disk is broken", "replace it")

    def give_up() -> None:
        with pytest.raises(BadHome, match="the daemon stopped"):
            ask(merged, ROLLBACK)

    monkeypatch.setattr(requests, "carry_out", fail)
    lock = durable.lock(merged.lock)
    durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
    woken: list[bool] = []
    with Store.open(merged.registry) as store:
        desk = Desk(merged, store, lambda: woken.append(True), lambda _: None)
        asked = Thread(target=give_up)
        asked.start()
        assert until(lambda: woken, 10)
        with pytest.raises(StorageFailed):
            desk.check()
        os.close(lock)
        asked.join()
        desk.close()


def test_another_command_that_holds_the_home_is_said_to(merged: Home, tmp_path: Path) -> None:
    lock = durable.lock(merged.lock)
    with pytest.raises(BadHome, match="another command of mainstem works on"):
        ask(merged, ROLLBACK)
    os.close(lock)
    assert ask(merged, ROLLBACK) and live(merged) == 3
