"""Everything is told, in order and at least once, to whoever is set up; and nobody who is told is ever waited for."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadConfig
from daemon.home.presence import Presence
from daemon.layout import Home
from daemon.metrics import Metrics
from daemon.outbox import couriers, sending
from daemon.outbox.sending import Sender, endpoints
from registry import engine, outbox
from registry.errors import DiskFull, StorageFailed
from registry.reader import Reader
from registry.records import Deed, Event, Happening, NewIntervention, Outcome, Status
from registry.store import Store
from tests.daemon.homes import count, drain, put, quick
from tests.daemon.outbox.receiver import SECONDS, SECRET, Received, Receiver, receiving, verified
from tests.daemon.processes import until
from tests.models import write_expert
from tests.registry.samples import expert, make, versions

HEADS = 2  # of the registry that the samples make: each commit is told so often


@pytest.fixture
def quiet(tmp_path: Path) -> Home:
    """A home of which there is no more than the registry."""
    home = Home(tmp_path / "quiet")
    home.state.mkdir(parents=True)
    make(home.registry)
    return home


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again soon, and given up soon."""
    monkeypatch.setattr(couriers, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(couriers, "PAUSE_FACTOR", 1.0)
    monkeypatch.setattr(couriers, "SHORT_SECONDS", 0.02)
    monkeypatch.setattr(couriers, "MOST_ATTEMPTS", 4)


@contextmanager
def telling(home: Home, settings: Settings, **more: Any) -> Iterator[tuple[Store, Sender, Metrics]]:
    metrics = Metrics()
    with Store.open(home.registry) as store, Sender(home, store, settings, metrics, **more) as sender:
        yield store, sender, metrics


def outcomes(store: Reader) -> list[Outcome]:
    """Of all deliveries, in order."""
    return [one.outcome for one in store.deliveries(1000)[::-1]]


def settled(store: Reader, *wanted: Outcome) -> bool:
    return until(lambda: outcomes(store) == list(wanted), SECONDS)


def test_a_run_tells_what_it_did(home: Home, base: Path, receiver: Receiver, tmp_path: Path) -> None:
    """One that drains once waits for whoever is told."""
    put(home, write_expert(tmp_path / "good.safetensors", base, seed=1))
    drain(home, quick())
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    put(home, tmp_path / "bad.safetensors")
    put(home, write_expert(tmp_path / "more.safetensors", base, seed=2))
    hook = ["sh", "-c", "echo $0 >> ran", "{head}/{version} {folder}"]
    metrics = drain(home, quick(webhooks=[receiver.webhook()], hooks={"published": hook}))
    told = receiver.wait(2)
    assert [one.what for one in told] == ["refused bad.safetensors", "published 2"]
    assert all(map(verified, told, [b"0123456789abcdef" * 2] * 2))
    refused, published = (one.said["data"] for one in told)
    assert published["home"] == str(home.root) and Path(published["folder"]).samefile(home.latest("main"))
    assert (published["head"], published["expert"], published["reason"]) == ("main", "more.safetensors", None)
    assert refused["reason"] == "truncated" and refused["hint"]
    assert (home.root / "ran").read_text() == f"main/2 {home.version('main', 2)}\n"
    with Reader.open(home.registry) as reader:
        assert outcomes(reader) == [Outcome.DELIVERED] * 3
    assert count(metrics, "mainstem_webhook_deliveries_total", outcome="delivered") == 3
    assert count(metrics, "mainstem_webhook_pending") == 0


def test_what_is_not_taken_is_tried_again_and_what_follows_waits_for_it(quiet: Home, receiver: Receiver) -> None:
    refusals = iter([(500, "no"), (302, ""), (404, "")])
    receiver.answer = lambda _: next(refusals, (200, "ok"))
    with telling(quiet, receiver.settings()) as (store, _, metrics):
        store.commit(expert(1), versions(1))
        store.commit(expert(2), versions(2))
        told = receiver.wait(3 + 2 * HEADS)
        assert [one.what for one in told] == ["published 1"] * (3 + HEADS) + ["published 2"] * HEADS
        assert len({one.message for one in told[:4]}) == 1 and len({one.body for one in told[:4]}) == 1
        assert settled(store, *[Outcome.DELIVERED] * 2 * HEADS)
        first = store.deliveries(1000)[-1]
        assert (first.attempts, first.answer) == (4, "200 OK: ok")
    assert count(metrics.registry, "mainstem_webhook_deliveries_total", outcome="failed") == 3


def test_what_is_never_taken_is_given_up_and_told_again_when_asked_for(quiet: Home, receiver: Receiver) -> None:
    receiver.answer = lambda request: (500 if request.what == "published 1" else 204, "")
    with telling(quiet, receiver.settings()) as (store, _, metrics):
        store.commit(expert(1), versions(1))
        store.commit(expert(2), versions(2))
        assert settled(store, *[Outcome.DEAD] * HEADS, *[Outcome.DELIVERED] * HEADS)
        assert until(lambda: count(metrics.registry, "mainstem_webhook_dead_letters") == HEADS, SECONDS)
        before = receiver.wait(4 * HEADS + HEADS)
        receiver.answer = lambda _: (204, "")
        store.redeliver(None)
        told = receiver.wait(len(before) + HEADS)
        assert [one.message for one in told[-HEADS:]] == [before[0].message, before[4].message]
        assert settled(store, *[Outcome.DELIVERED] * 2 * HEADS)
    assert count(metrics.registry, "mainstem_webhook_deliveries_total", outcome="dead") == HEADS


def test_who_is_dead_is_not_tried_the_more_often_the_more_is_dropped_for_later_events(
    quiet: Home, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(couriers, "FIRST_PAUSE_SECONDS", 1000.0)
    monkeypatch.setattr(outbox, "MOST_ROWS", 3)
    receiver.answer = lambda _: (500, "")
    with telling(quiet, receiver.settings()) as (store, _, _metrics):
        store.announce(Happening(Event.HELD, {"number": 0}))
        receiver.wait(1)
        assert until(lambda: store.pending(1, 1)[0].attempts == 1, SECONDS)
        for number in range(1, 20):
            store.announce(Happening(Event.HELD, {"number": number}))
        receiver.answer = lambda _: (204, "")
        store.redeliver([store.pending(1, 1)[0].id - 1])  # which went: nothing happens
        assert len(receiver.requests) == 1 and store.endpoints()[0].dropped == 17
    with telling(quiet, receiver.settings()):
        assert [one.what for one in receiver.wait(4)[1:]] == ["held 17", "held 18", "held 19"]


def test_what_waits_by_a_clock_that_was_years_ahead_is_tried_at_once(quiet: Home, receiver: Receiver) -> None:
    settings = receiver.settings()
    with Store.open(quiet.registry) as store:
        store.follow_endpoints([one.endpoint for one in endpoints(quiet, settings)])
        store.commit(expert(1), versions(1))
        ahead = datetime.now(UTC) + timedelta(days=3650)
        store.note_deliveries([replace(one, attempts=3, next_at=ahead) for one in store.pending(1, 10)])
    with telling(quiet, settings) as (store, _, _metrics):
        assert settled(store, *[Outcome.DELIVERED] * HEADS)


def test_who_does_not_answer_holds_up_nobody(quiet: Home, receiver: Receiver) -> None:
    """Neither what is committed, nor others who are told, nor the end of the daemon."""
    over = threading.Event()

    def hang(_: Received) -> tuple[int, str]:
        over.wait(SECONDS)
        return 204, ""

    with receiving() as hanging:
        hanging.answer = hang
        settings = Settings.model_validate({"webhooks": [hanging.webhook(timeout_seconds=SECONDS), receiver.webhook()]})
        with telling(quiet, settings) as (store, _, _metrics):
            for number in range(1, 6):
                store.commit(expert(number), versions(number))
            receiver.wait(5 * HEADS)
            assert store.count_undelivered()[0] >= 5 * HEADS
        over.set()


def test_a_hook_runs_for_the_newest_version_alone(quiet: Home) -> None:
    """Those before were overtaken while it could not run; each head has its own."""
    hook = {"published": ["sh", "-c", "echo $0 >> ran", "{head}/{version}"]}
    settings = Settings.model_validate({"hooks": hook})
    with Store.open(quiet.registry) as store:
        store.follow_endpoints([one.endpoint for one in endpoints(quiet, settings)])
        for number in range(1, 4):
            store.commit(expert(number), versions(number))
        store.record(expert(4, Status.QUARANTINED, reason="pickle"))
        store.turn("main", 2, NewIntervention(Deed.ROLLBACK, "ann"), frozen="rolled back")
    with telling(quiet, settings) as (store, _, _metrics):
        run = [Outcome.DELIVERED, Outcome.DELIVERED]
        assert settled(store, *[Outcome.OVERTAKEN] * 5, *run)
    assert sorted((quiet.root / "ran").read_text().split()) == ["init/3", "main/2"]


def test_a_run_that_drains_once_lets_a_hook_come_to_its_end(quiet: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a server is reloaded, that takes longer than a webhook does; who is told to stop does not wait."""
    monkeypatch.setattr(sending, "ONCE_SECONDS", 0.0)
    hook = {"published": ["sh", "-c", "sleep 0.5; echo $0 >> ran", "{head}/{version}"]}
    settings, stopping = Settings.model_validate({"hooks": hook}), threading.Event()
    with telling(quiet, settings, once=stopping) as (store, _, _metrics):
        store.commit(expert(1), versions(1))
    assert len((quiet.root / "ran").read_text().split()) == HEADS
    with telling(quiet, settings, once=stopping) as (store, _, _metrics):
        store.commit(expert(2), versions(2))
        stopping.set()
    assert len((quiet.root / "ran").read_text().split()) == HEADS


def test_a_hook_that_failed_is_tried_at_once_with_the_next_version(
    quiet: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(couriers, "FIRST_PAUSE_SECONDS", 1000.0)
    hook = {"published": ["sh", "-c", "[ $0 = main/2 ] || [ $0 = init/2 ]", "{head}/{version}"]}
    with telling(quiet, Settings.model_validate({"hooks": hook})) as (store, _, _metrics):
        store.commit(expert(1), versions(1))
        assert until(lambda: any(one.attempts for one in store.pending(1, 10)), SECONDS)
        store.commit(expert(2), versions(2))
        assert settled(store, *[Outcome.OVERTAKEN] * HEADS, *[Outcome.DELIVERED] * HEADS)


def test_who_comes_later_hears_what_comes_later_and_who_stays_is_not_disturbed(quiet: Home, receiver: Receiver) -> None:
    with receiving() as other, telling(quiet, receiver.settings()) as (store, sender, _):
        store.commit(expert(1), versions(1))
        receiver.wait(HEADS)
        (before,) = sender._couriers
        both = Settings.model_validate({"webhooks": [receiver.webhook(), other.webhook(events=["published"])]})
        sender.adopt(both, endpoints(quiet, both))
        assert sender._couriers[0] is before
        store.commit(expert(2), versions(2))
        assert {one.what for one in other.wait(HEADS)} == {"published 2"}
        receiver.wait(2 * HEADS)
        sender.adopt(Settings(), [])
        store.commit(expert(3), versions(3))
        assert store.deliveries() == [] and not sender._couriers
    receiver.wait(2 * HEADS)


def test_what_was_told_is_not_told_again_while_it_cannot_be_written_down(
    quiet: Home, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.01)
    with telling(quiet, receiver.settings()) as (store, sender, _):
        store.commit(expert(1), versions(1))
        assert settled(store, *[Outcome.DELIVERED] * HEADS)
        with closing(sqlite3.connect(quiet.registry, isolation_level=None)) as other:
            store.follow_endpoints(store.endpoints())
            store.commit(expert(2), versions(2))
            other.execute("BEGIN IMMEDIATE")
            sender.wake()
            receiver.wait(2 * HEADS)
            threading.Event().wait(0.2)
            other.execute("ROLLBACK")
        assert settled(store, *[Outcome.DELIVERED] * 2 * HEADS)
        receiver.wait(2 * HEADS)


def test_that_the_disk_is_full_is_told_although_nothing_can_be_written(
    quiet: Home, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(500, ""), (204, "")])
    receiver.answer = lambda _: next(answers)

    def full(_: Happening) -> None:
        raise DiskFull("the disk is full", "make room")

    with telling(quiet, receiver.settings()) as (store, sender, _):
        monkeypatch.setattr(sender._own, "announce", full)
        sender.announce(Happening(Event.STALLED, {"reason": "disk_full"}))
        told = receiver.wait(2)
        assert [one.what for one in told] == ["stalled disk_full"] * 2
        assert told[0].message == told[1].message
        assert store.deliveries() == []


def test_other_webhooks_on_a_full_disk_end_nothing_and_are_taken_once_there_is_room(
    quiet: Home, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise DiskFull("the disk is full", "make room")

    with telling(quiet, Settings()) as (store, sender, _):
        wanted = receiver.settings()
        with monkeypatch.context() as filled:
            filled.setattr(store, "follow_endpoints", full)
            sender.adopt(wanted, endpoints(quiet, wanted))
        assert not sender._couriers
        sender.adopt(wanted, endpoints(quiet, wanted))
        store.commit(expert(1), versions(1))
        receiver.wait(HEADS)


def test_a_stall_is_told_by_the_daemon_that_waits(home: Home, receiver: Receiver) -> None:
    """Of one that looks for its inbox, in vain."""
    home.inbox.rmdir()
    settings = receiver.settings(events=["stalled", "recovered"])
    settings = settings.model_copy(update={"hooks": settings.hooks.model_copy(update={"stalled_seconds": 0.05})})
    lock, presence = durable.lock(home.lock), Presence(home)
    presence.starts()
    try:
        with telling(home, settings):
            (told,) = receiver.wait(1)
            assert told.what == "stalled no_inbox"
            home.inbox.mkdir()
            assert receiver.wait(2)[1].what == "recovered no_inbox"
    finally:
        presence.ends()
        os.close(lock)


@pytest.mark.parametrize("crashed", [True, False])
def test_a_start_tells_that_it_goes_on_after_a_crash_or_a_stall(quiet: Home, receiver: Receiver, crashed: bool) -> None:
    with telling(quiet, receiver.settings(), crashed=crashed) as (store, sender, _):
        if not crashed:
            sender.announce(Happening(Event.STALLED, {"reason": "disk_full"}))
            assert settled(store, Outcome.DELIVERED)
    with telling(quiet, receiver.settings()):
        told = receiver.wait(1 if crashed else 2)
        assert told[-1].what == f"recovered {'crash' if crashed else 'start'}"
    with telling(quiet, receiver.settings(), once=threading.Event()):
        pass
    assert len(receiver.requests) == len(told)  # once


def test_a_disk_that_failed_under_a_courier_ends_merging(quiet: Home, receiver: Receiver) -> None:
    with telling(quiet, receiver.settings()) as (store, sender, _):
        sender.failed(StorageFailed("the disk failed", "look at it"))
        with pytest.raises(StorageFailed):
            store.commit(expert(1), versions(1))


def test_a_fault_of_ours_ends_no_merging(quiet: Home, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(couriers, "FAULT_SECONDS", 0.02)
    faults = iter([RuntimeError("a fault")])
    with telling(quiet, receiver.settings()) as (store, sender, _):
        (courier,) = sender._couriers
        whole = courier.way.deliver

        def deliver(delivery: Any) -> Any:
            for fault in faults:
                raise fault
            return whole(delivery)

        monkeypatch.setattr(courier.way, "deliver", deliver)
        store.commit(expert(1), versions(1))
        receiver.wait(HEADS)


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        ({}, "set secret or secret_file"),
        ({"secret": SECRET, "secret_file": "x"}, "and not both"),
        ({"secret": "whsec_c2hvcnQ="}, "24 to 64 bytes"),
        ({"secret": SECRET.removeprefix("whsec_")}, "whsec_"),
        ({"secret": f"{SECRET} nonsense"}, "base64"),
        ({"secret_file": "missing"}, "missing"),
    ],
)
def test_a_secret_that_is_no_good_one_is_refused(quiet: Home, secret: dict[str, str], said: str) -> None:
    settings = Settings.model_validate({"webhooks": [{"url": "https://example.com", **secret}]})
    with pytest.raises(BadConfig, match=said) as refused:
        endpoints(quiet, settings)
    assert "head -c 32 /dev/urandom | base64" in refused.value.hint
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://example.com", "https://", "example.com", "https://me:word@example.com"),
        *("https://example.com/#x", "https://a b", "http://x:0"),
    ],
)
def test_a_url_that_cannot_be_told_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"it is no http|it has no user"):
        Settings.model_validate({"webhooks": [{"url": url}]})


def test_no_secret_is_shown() -> None:
    settings = Settings.model_validate({"webhooks": [{"url": "https://example.com", "secret": SECRET}]})
    assert settings.flat()["webhooks.0.url"] == "https://example.com"
    assert SECRET not in str(settings.flat()) and SECRET not in repr(settings)
