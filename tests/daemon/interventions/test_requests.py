"""How a command reaches the daemon, and what either is told where that goes wrong."""

import errno
import json
import os
import time
from pathlib import Path
from threading import Event, Thread

import pytest

from daemon.arrivals.inbox import Inbox
from daemon.compute.progress import Progress
from daemon.disk import durable
from daemon.errors import BadHome
from daemon.interventions import requests, waiting
from daemon.interventions.deeds import Request
from daemon.interventions.requests import Desk, ask
from daemon.layout import Home
from daemon.merge.merger import Merger
from daemon.service import Service
from projector.errors import DeviceLost
from registry.errors import StorageFailed
from registry.records import Deed, NewEvaluation, Score
from registry.store import Store
from tests.daemon.homes import lineage, live, quick
from tests.daemon.processes import until

ROLLBACK = Request(Deed.ROLLBACK, "ann", "why", "main", 3)


def test_what_cannot_be_read_is_passed_over_and_the_next_one_answered(merged: Home) -> None:
    lock = durable.lock(merged.lock)
    changed: list[Request] = []
    with Store.open(merged.registry) as store:
        desk = Desk(merged, store, lambda: None, changed.append, lambda _: None)
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
        desk = Desk(merged, store, lambda: None, lambda _: None, lambda _: None)
        heard: list[str] = []

        def wait() -> None:
            try:
                ask(merged, Request(Deed.WITHDRAW, "ann", experts=(1,)), say=heard.append)
            except BadHome as error:
                heard.append(str(error))

        waiting = Thread(target=wait)
        waiting.start()
        assert until(lambda: desk.waiting, 30)
        assert until(lambda: heard, 30) == ["waiting for the expert that is being merged"]
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
        desk = Desk(merged, store, lambda: woken.append(True), lambda _: None, lambda _: None)
        asked = Thread(target=give_up)
        asked.start()
        assert until(lambda: woken, 30)
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


def asking(home: Home, request: Request, heard: list[str]) -> Thread:
    """Somebody who asks, and what they are told."""

    def ask_and_hear() -> None:
        try:
            heard.extend(ask(home, request, say=lambda _: None))
        except BadHome as error:
            heard.append(str(error))

    thread = Thread(target=ask_and_hear)
    thread.start()
    return thread


class Full(Service):
    """A daemon whose disk is full while main/1 is there."""

    def _finish(self, store: Store, merger: Merger) -> None:
        if self._home.version("main", 1).exists():
            raise OSError(errno.ENOSPC, "full")


def test_what_waits_is_done_while_the_disk_is_full_and_may_make_room(merged: Home) -> None:
    settings = quick(retention={"versions": 1, "grace_seconds": 0})
    service, heard = Full(merged, settings), list[str]()
    lock = durable.lock(merged.lock)
    durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
    with Store.open(merged.registry) as store:
        merger = Merger(merged, store, settings, Progress(service._stopping, lambda _: None))
        desk = Desk(merged, store, service._signalled.set, lambda _: None, lambda _: None)
        asked = asking(merged, Request(Deed.COLLECT, "ann"), heard)
        inbox = Inbox(merged.inbox, 0, time.monotonic)
        service._make_room(OSError(errno.ENOSPC, "full"), store, merger, inbox, desk, once=False)
        asked.join()
        desk.close()
        merger.close()
    os.close(lock)
    assert heard[0].startswith("main/1: ") and not merged.version("main", 1).exists()


def test_a_lost_device_is_told_to_who_asked_and_ends_the_daemon(merged: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object, **__: object) -> None:
        raise DeviceLost("an illegal memory access", "start it again")

    monkeypatch.setattr(waiting, "withdraw_from", lose)
    heard: list[str] = []
    lock = durable.lock(merged.lock)
    durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
    with Store.open(merged.registry) as store:
        desk = Desk(merged, store, lambda: None, lambda _: None, lambda _: None)
        asked = asking(merged, Request(Deed.WITHDRAW, "ann", experts=(4,)), heard)
        assert until(lambda: desk.waiting, 30)
        with pytest.raises(DeviceLost):
            waiting.answer_waiting(merged, store, quick(), desk, Event())
        desk.close()  # as the end of the process does
    os.close(lock)
    asked.join()
    assert heard == ["an illegal memory access"]


def test_who_asks_on_a_full_disk_does_so_in_the_space_that_was_set_aside(
    merged: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, room = durable.note, merged.requests / ".room"

    def full(path: Path, data: bytes) -> None:
        if path.parent == merged.requests and room.exists():
            raise OSError(errno.ENOSPC, "full")
        note(path, data)

    lock = durable.lock(merged.lock)
    durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
    with Store.open(merged.registry) as store:
        desk = Desk(merged, store, lambda: None, lambda _: None, lambda _: None)
        assert room.stat().st_blocks * 512 >= requests.ROOM_BYTES
        monkeypatch.setattr(durable, "note", full)
        assert ask(merged, ROLLBACK)[0] == "main/3 is live, main/4 is not"
        assert until(room.exists, 30), "it is set aside again"
        desk.close()
    os.close(lock)


def test_what_took_long_is_handed_in_once_the_home_is_free(merged: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(requests, "PATIENCE_SECONDS", 0.2)
    lock, heard = durable.lock(merged.lock), list[str]()

    def hear(text: str) -> None:
        heard.append(text)
        if len(heard) == 1:  # another command; next a daemon that recovers, and then ends
            durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
        elif len(heard) == 2:
            os.close(lock)

    new = NewEvaluation("ab", "cd", {"sst2": Score(0.9)}, 3600.0)
    requests.insist(merged, Request(Deed.EVALUATE, "ann", None, "main", 3, evaluation=new), hear)
    assert [text.split(" of ")[0] for text in heard] == [
        "another command",
        "the daemon has not answered within 0 seconds: asking again",
    ]
    with lineage(merged) as reader:
        assert (kept := reader.evaluated("ab", "cd")) and kept.scores == {"sst2": Score(0.9)}


def test_who_asked_while_a_daemon_recovered_is_answered_once_it_has(merged: Home) -> None:
    """It takes away what others were asked, before it answers anything."""
    lock, heard = durable.lock(merged.lock), list[str]()
    durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
    asked = asking(merged, ROLLBACK, heard)
    assert until(merged.requests.exists, 30)
    with Store.open(merged.registry) as store:
        desk = Desk(merged, store, lambda: None, lambda _: None, lambda _: None)
        asked.join()
        desk.close()
    os.close(lock)
    assert heard[0] == "main/3 is live, main/4 is not"


def test_what_was_withdrawn_meanwhile_is_not_withdrawn_again(merged: Home) -> None:
    lock, heard = durable.lock(merged.lock), list[str]()
    durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
    with Store.open(merged.registry) as store:
        desk = Desk(merged, store, lambda: None, lambda _: None, lambda _: None)
        asked = asking(merged, Request(Deed.WITHDRAW, "ann", version=4, experts=(4,)), heard)
        assert until(lambda: desk.waiting, 30)
        waiting.answer_waiting(merged, store, quick(), desk, Event())
        asked.join()
        desk.close()
    os.close(lock)
    assert heard == ["one of these experts is in the merge no more"] and live(merged) == 4


def test_a_daemon_that_is_killed_in_the_midst_is_told_of(merged: Home) -> None:
    """What it said last lies there, and nobody takes it away."""
    lock, heard = durable.lock(merged.lock), list[str]()
    durable.note(merged.presence, json.dumps({"pid": os.getpid(), "since": "now"}).encode())
    asked = asking(merged, Request(Deed.WITHDRAW, "ann", experts=(4,)), heard)
    assert until(lambda: merged.requests.exists() and list(merged.requests.glob("[!.]*.json")), 30)
    (name,) = merged.requests.glob("[!.]*.json")
    durable.note(name.with_suffix(requests.ANSWER), json.dumps({"doing": "merging the first"}).encode())
    os.close(lock)
    asked.join(20)
    assert heard == ["the daemon stopped before it answered"]
