"""What needs a person, and the command that ends it."""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from daemon.disk import durable
from daemon.home import attention as module
from daemon.home.attention import CASES, Matter, attention
from daemon.home.condition import condition
from daemon.home.presence import Presence
from daemon.layout import Home
from registry.records import (
    Deed,
    EndpointKind,
    Event,
    Happening,
    NewEndpoint,
    NewExpert,
    NewIntervention,
    Outcome,
    Status,
)
from registry.store import Store
from tests.daemon.processes import forked

AT = "home"  # the home from the folder that it is in


def matters(home: Home, store: Store) -> list[tuple[str, str, tuple[str, ...]]]:
    found = attention(condition(home, store), store, home, AT)
    return [(one.kind, one.text, tuple(one.commands)) for one in found]


def test_all_that_needs_a_person_with_the_command_that_ends_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(home.registry) as store:
        assert [(kind, commands) for kind, _, commands in matters(home, store)] == [
            ("trouble", (f"mainstem run --home {AT}",))
        ]
        lock, presence = durable.lock(home.lock), Presence(home)
        presence.starts()
        presence.watches()
        assert matters(home, store) == []
        (home.inbox / "it's half").mkdir()
        (home.inbox / "its turn comes").mkdir()
        presence.waits("it's half", "it has no weights yet")
        assert matters(home, store) == [], "not for long"
        monkeypatch.setattr(module, "LONG", timedelta(seconds=-5))
        inspect = (f"mainstem inspect '{AT}/inbox/it'\"'\"'s half' --home {AT}",)
        assert matters(home, store) == [
            ("incomplete", "it's half waits in the inbox: it has no weights yet", inspect),
        ]
        paused = replace(condition(home, store), doing="paused", text="merging is paused: since noon", waiting=[])
        assert attention(paused, store, home, AT) == [
            Matter("paused", "merging is paused: since noon", commands=[f"mainstem resume --home {AT}"])
        ]
        os.close(lock)
        presence.ends()


def test_what_is_refused_and_held(home: Home) -> None:
    lock, presence = durable.lock(home.lock), Presence(home)
    presence.starts()
    presence.watches()
    bad = NewExpert(
        "bad", "file", None, 1, Status.QUARANTINED, datetime.now(UTC), "1:2", reason="pickle", detail="it is"
    )
    with Store.open(home.registry) as store:
        ids = [store.record(bad).id for _ in range(CASES + 2)]
        for one in ids:
            store.placed(one, f"quarantine/{one:06d}")
        found = matters(home, store)
        retry, discard = (f"mainstem quarantine {deed} {ids[-1]} --home {AT}" for deed in ("retry", "discard"))
        assert found[0] == ("refused", "bad was refused (pickle): it is", (retry, discard))
        store.block([ids[-1]], True, NewIntervention(Deed.BLOCK, "ada", experts=(ids[-1],)))
        assert matters(home, store)[0][2] == (f"mainstem unblock {ids[-1]} --home {AT} && {retry}", discard)
        more = ("refused", "2 more cases of quarantine are open", (f"mainstem quarantine list --home {AT}",))
        assert len(found) == CASES + 1 and found[-1] == more
        store.turn("main", 0, NewIntervention(Deed.ROLLBACK, "ada", head="main", version=0), "it was worse")
        held = "main/0, the newest, is not live, nor will the next be: it was worse"
        assert matters(home, store)[0] == ("held", held, (f"mainstem promote main/0 --home {AT}",))
    os.close(lock)
    presence.ends()


def test_what_nobody_could_be_told_and_is_given_up(home: Home) -> None:
    endpoint = NewEndpoint(EndpointKind.WEBHOOK, "https://example.com/", tuple(Event))
    with Store.open(home.registry) as store:
        store.follow_endpoints([endpoint])
        store.announce(Happening(Event.STALLED, {}))
        (pending,) = store.pending(store.endpoints()[0].id, 10)
        before = matters(home, store)
        store.note_deliveries([replace(pending, outcome=Outcome.DEAD)])
        (found,) = [one for one in matters(home, store) if one not in before]
        kind, text, (command,) = found
        assert (kind, "of 1 event:" in text) == ("undelivered", True)
    assert forked(*command.split()[1:], cwd=home.root.parent).returncode == 0  # and what it says works
    with Store.open(home.registry) as store:
        assert matters(home, store) == before
        store.follow_endpoints([])
