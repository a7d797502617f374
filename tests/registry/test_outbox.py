"""What is to be told is written with what happened, or not at all; an endpoint has a bounded number of rows."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from registry import outbox
from registry.errors import AlreadyMerged
from registry.reader import Reader
from registry.records import (
    Deed,
    Delivery,
    EndpointKind,
    Event,
    Happening,
    NewEndpoint,
    NewIntervention,
    Outcome,
    Status,
)
from registry.store import Store
from tests.registry.many import Steps
from tests.registry.samples import expert, make, versions

ALL = NewEndpoint(EndpointKind.WEBHOOK, "https://example.com/all", tuple(Event))
LIVE = NewEndpoint(EndpointKind.HOOK, '["reload"]', (Event.PUBLISHED, Event.ROLLED_BACK))
ANN = NewIntervention(Deed.ROLLBACK, "ann", "worse")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(make(tmp_path / "registry.sqlite")) as store:
        yield store


def told(reader: Reader, endpoint: int = 1) -> list[tuple[Event, object, object]]:
    """What an endpoint is still to be told: the event, the head and the version, in order."""
    return [(one.event, one.data.get("head"), one.data.get("version")) for one in reader.pending(endpoint, 10_000)]


def test_nobody_is_told_where_nobody_wants_to_hear(store: Store) -> None:
    store.commit(expert(1), versions(1))
    assert store.deliveries() == []


def test_each_event_is_written_with_what_happened(store: Store) -> None:
    store.follow_endpoints([ALL])
    main, init = versions(1)
    store.commit(expert(1, name="one"), [main, replace(init, held="worse")])
    store.commit(expert(2), versions(2))
    store.record(expert(3, Status.QUARANTINED, reason="pickle", detail="why", hint="what to do"))
    store.record(expert(4, Status.QUARANTINED, reason="scores", verdict={"outcome": "rejected"}))
    store.record(expert(1, Status.DUPLICATE))
    store.turn("main", 1, ANN, frozen="rolled back")
    store.turn("main", 2, replace(ANN, deed=Deed.PROMOTE), frozen=None)
    withdrawal = NewIntervention(Deed.WITHDRAW, "ann", experts=(2,))
    store.restate(versions(3), [2], withdrawal)
    assert told(store) == [
        (Event.PUBLISHED, "main", 1),
        (Event.HELD, "init", 1),
        (Event.PUBLISHED, "main", 2),
        (Event.PUBLISHED, "init", 2),
        (Event.REFUSED, None, None),
        (Event.REJECTED, None, None),
        (Event.ROLLED_BACK, "main", 1),
        (Event.PROMOTED, "main", 2),
        (Event.PUBLISHED, "main", 3),
        (Event.PUBLISHED, "init", 3),
    ]
    found = store.pending(1, 100)
    assert (found[0].data["expert"], found[0].data["expert_id"], found[0].data["reason"]) == ("one", 1, None)
    assert found[1].data["reason"] == "worse"
    assert found[4].data["hint"] == "what to do"
    assert (found[6].data["previous"], found[6].data["who"], found[6].data["why"]) == (2, "ann", "worse")
    assert (found[8].data["deed"], found[8].data["without"]) == ("withdraw", [2])
    assert len({one.message for one in found}) == len(found)


def test_what_is_not_committed_is_not_told(store: Store) -> None:
    store.follow_endpoints([ALL])
    store.commit(expert(1), versions(1))
    before = store.deliveries()
    with pytest.raises(AlreadyMerged):
        store.commit(expert(1), versions(2))
    assert store.deliveries() == before


def test_an_event_is_called_the_same_wherever_it_is_told(store: Store) -> None:
    store.follow_endpoints([ALL, LIVE])
    store.commit(expert(1), versions(1))
    store.record(expert(2, Status.QUARANTINED, reason="pickle"))
    of_all, of_live = store.pending(1, 100), store.pending(2, 100)
    assert [one.message for one in of_live] == [one.message for one in of_all[:2]]
    assert len(of_all) == 3


def test_who_comes_later_hears_what_comes_later_and_what_goes_takes_its_deliveries_along(store: Store) -> None:
    store.follow_endpoints([ALL])
    store.commit(expert(1), versions(1))
    store.follow_endpoints([replace(ALL, events=(Event.REFUSED,)), LIVE])
    store.commit(expert(2), versions(2))
    assert [len(store.pending(one.id, 100)) for one in store.endpoints()] == [2, 2]
    (kept,) = store.follow_endpoints([LIVE])
    assert kept.target == LIVE.target
    assert {one.endpoint for one in store.deliveries()} == {kept.id}
    last = store.deliveries(1)[0].id
    store.follow_endpoints([])
    assert store.deliveries() == []
    store.follow_endpoints([ALL])
    store.commit(expert(3), versions(3))
    assert store.deliveries()[-1].id > last  # an id means one delivery for ever


def test_an_endpoint_has_a_bounded_number_of_rows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MOST_ROWS", 5)
    store.follow_endpoints([ALL, LIVE])
    store.commit(expert(1), versions(1))
    first = store.pending(1, 1)[0]
    store.note_deliveries([replace(first, outcome=Outcome.DELIVERED)])
    for number in range(2, 12):
        store.announce(Happening(Event.STALLED, {"number": number}))
    assert [one.data["number"] for one in store.pending(1, 100)] == [7, 8, 9, 10, 11]
    assert len(store.pending(2, 100)) == 2
    # of the seven that went, one had been delivered
    assert [one.dropped for one in store.endpoints()] == [6, 0]


def noted(store: Store, **what: object) -> Delivery:
    """The first pending delivery, once that became of it."""
    one = replace(store.pending(1, 1)[0], tried_at=datetime.now(UTC), **what)
    store.note_deliveries([one])
    return one


def test_what_became_of_a_delivery_is_kept_and_what_is_dead_may_be_told_again(store: Store) -> None:
    store.follow_endpoints([ALL])
    for number in range(1, 4):
        store.commit(expert(number), versions(number))
    dead = [noted(store, outcome=Outcome.DEAD, attempts=12, answer="500") for _ in range(2)]
    done = noted(store, outcome=Outcome.DELIVERED, attempts=1, answer="204")
    assert store.count_undelivered() == (3, 2)
    assert store.deliveries(outcome=Outcome.DEAD) == dead[::-1]
    assert store.deliveries(outcome=Outcome.DELIVERED) == [done]
    assert store.redeliver(None) == 2
    assert store.count_undelivered() == (5, 0)
    again = store.delivery(dead[0].id)
    assert again and (again.message, again.attempts, again.next_at) == (dead[0].message, 0, None)
    assert store.redeliver([done.id, 10_000]) == 1
    assert [one.id for one in store.pending(1, 100)] == [1, 2, 3, 4, 5, 6]  # in the order of what happened
    assert store.last_told((Event.STALLED, Event.RECOVERED)) is None
    store.announce(Happening(Event.STALLED, {}))
    assert store.last_told((Event.STALLED, Event.RECOVERED)) is Event.STALLED


def test_who_listens_hears_of_each_transaction_once_it_is_over(store: Store) -> None:
    heard: list[int] = []
    store.committed = lambda: heard.append(len(store.deliveries()))
    store.follow_endpoints([ALL])
    store.commit(expert(1), versions(1))
    assert heard == [0, 2]


def test_an_event_and_a_look_cost_the_same_however_much_was_told_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MOST_ROWS", 20)
    store.follow_endpoints([ALL])
    taken = []
    for count in (30, 90):
        for number in range(count):
            store.announce(Happening(Event.STALLED, {"number": number}))
        store.note_deliveries([replace(one, outcome=Outcome.DEAD) for one in store.pending(1, 100)[:-1]])
        with Steps() as steps:
            store.announce(Happening(Event.RECOVERED, {}))
            store.pending(1, 100)
            store.count_undelivered()
        taken.append(steps.taken)
    assert abs(taken[1] - taken[0]) <= taken[0] / 20, taken
