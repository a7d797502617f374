"""`mainstem pause`, `resume` and `drain`: with a daemon and without, and across restarts."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog

from daemon.arrivals.inbox import Drop, Held, Scan
from daemon.cli.drain import _doing as doing
from daemon.cli.status import _lasting as lasting
from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.orders import Kind, Order, Orders, give, order, planned
from daemon.home.presence import Presence
from daemon.home.presence import running as running_now
from daemon.interventions.deeds import Request, carry_out
from daemon.interventions.requests import ask
from daemon.layout import Home
from daemon.service import Service
from registry.records import Deed
from registry.store import Store
from tests.daemon.homes import drain, experts, lineage, live, make_home, put, quick
from tests.daemon.processes import Daemon, forked, running, until
from tests.models import write_base, write_expert


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("orders")
    return make_home(root / "home", write_base(root / "base.safetensors", seed=1))


@pytest.fixture
def home(made: Home, tmp_path: Path) -> Home:
    return Home(shutil.copytree(made.root, tmp_path / "home", symlinks=True))


def expert(home: Home, tmp_path: Path, seed: int) -> Path:
    return write_expert(tmp_path / f"{seed}.safetensors", home.base / "model.safetensors", seed)


def told(daemon: Daemon, words: str) -> bool:
    return bool(until(lambda: any(words in line for line in daemon.lines), 60))


def test_a_daemon_that_was_paused_before_it_started_and_is_drained(home: Home, tmp_path: Path) -> None:
    assert forked("pause", home.root, "--reason", "a night's rest").returncode == 0
    assert "nothing is to be done" in forked("pause", home.root).stdout
    put(home, expert(home, tmp_path, 2))
    with pytest.raises(BadHome, match=r"paused.*a night's rest"):
        drain(home)
    with running("run", "--home", home.root, "--no-http") as daemon:
        assert told(daemon, "merging is paused")
        said = json.loads(forked("status", home.root, "--json").stdout)
        assert said["doing"] == "paused"
        assert re.fullmatch(r"merging is paused for \d+ s, by .* \(a night's rest\)", said["text"])
        assert said["waiting"][0]["why"] == "merging is paused"
        assert experts(home) == [] and len(list(home.inbox.iterdir())) == 1
        assert forked("resume", home.root).stdout == "merging goes on\n"
        assert until(lambda: live(home) == 1, 60)
        assert forked("pause", home.root).returncode == 0
        assert until(lambda: json.loads(home.presence.read_bytes())["doing"] == "paused", 30)
        for seed in (3, 4):
            put(home, expert(home, tmp_path, seed))
        done = forked("drain", home.root)  # the last order counts
        assert done.returncode == 0 and done.stdout.endswith("stopped: the inbox is empty\n"), done.stderr
        assert "asked for: merging was paused" in done.stdout
        assert daemon.process.wait(timeout=30) == 0
    assert live(home) == 3 and order(home) is None and home.clean.exists()
    with lineage(home) as reader:
        found = [(one.deed, one.why) for one in reader.interventions()]
    assert found == [(Deed.DRAIN, None), (Deed.PAUSE, None), (Deed.RESUME, None), (Deed.PAUSE, "a night's rest")]


def test_an_order_says_for_how_long_in_words() -> None:
    began = datetime(2026, 3, 1, 12, tzinfo=UTC)
    pause = Order(Kind.PAUSE, began.isoformat(), "ada", "a new disk")
    assert pause.text(began + timedelta(minutes=3)) == "merging is paused for 3 min, by ada (a new disk)"
    assert pause.text(began + timedelta(days=4)) == "merging is paused for 4 days, by ada (a new disk)"
    unread = Order(Kind.PAUSE, "-", "-", "order.json cannot be read")
    assert unread.text() == "merging is paused, by - (order.json cannot be read)"
    drained = Order(Kind.DRAIN, began.isoformat(), "ada")
    assert drained.text() == "the queue is finished, then the daemon stops: asked for by ada"
    looks = [{"text": pause.text(began + timedelta(seconds=n)), "heads": []} for n in (5, 6, 5000)]
    assert len({lasting(look, as_json) for look in looks for as_json in (True, False)}) == 2, "to wait is no change"


def test_without_a_daemon_a_drain_merges_by_itself(home: Home, tmp_path: Path) -> None:
    put(home, expert(home, tmp_path, 2))
    (home.root / "mainstem.toml").write_text("[inbox]\nsettle_seconds = 0\n")
    done = forked("drain", home.root)
    assert done.returncode == 0 and done.stdout.endswith("stopped: the inbox is empty\n"), done.stderr
    assert live(home) == 1 and order(home) is None


def test_a_drain_says_which_entry_it_waits_for(home: Home) -> None:
    lock, presence = durable.lock(home.lock), Presence(home)
    presence.starts()
    presence.watches()

    def said() -> str | None:
        daemon = running_now(home)
        return doing(daemon) if daemon else "no daemon"

    assert said() is None
    presence.waits("half.safetensors", "half.safetensors: the file has 5 bytes")
    assert said() == "waits for half.safetensors: the file has 5 bytes"
    with presence.merging("next.safetensors"):
        presence.progresses(0.25)
        assert said() == "merging next.safetensors"
    os.close(lock)
    presence.ends()


def test_a_drain_ends_with_what_it_began_with(home: Home) -> None:
    orders = Orders(home, Presence(home), structlog.get_logger(), once=False)
    first, later = (Drop(name, name, 0, 1, 9.0) for name in ("first", "later"))
    give(home, Deed.DRAIN, "ada", None)
    assert not orders.draining, "the list is older"
    orders.lists()
    scan = Scan([first], 1, [Held("held", ".held.part", 9.0)], {}, frozenset({"moving"}))
    assert orders.draining and orders.allowed([first], scan) == [first]
    now = Scan([later], 2, [], {}, frozenset({"moving", "another"}))
    assert orders.allowed([later], now) == []
    assert orders.queue(now) == Scan([], 1, [], {}, frozenset({"moving"}))
    give(home, Deed.RESUME, "ada", None)
    assert orders.allowed([later], now) == [later] and orders.queue(now) is now and not orders.draining


def test_what_was_there_before_the_drain_was_asked_for_is_decided(home: Home, tmp_path: Path) -> None:
    """Both come while the loop looks at what it listed before, an entry that is not complete."""
    whole = expert(home, tmp_path, 2)
    (home.inbox / "half.safetensors").write_bytes(expert(home, tmp_path, 3).read_bytes()[:-5])

    @contextmanager
    def display(_: Drop) -> Iterator[Callable[[float], None]]:
        if whole.exists():
            put(home, whole)
            give(home, Deed.DRAIN, "ada", None)
        yield lambda share: None

    Service(home, quick(inbox={"resume_seconds": 3600}), display).run(http=False)
    assert [path.name for path in home.inbox.iterdir()] == ["half.safetensors"]
    assert live(home) == 1 and order(home) is None


def test_the_last_order_counts_and_one_that_cannot_be_read_is_a_pause(home: Home) -> None:
    with Store.open(home.registry) as store:
        for deed in (Deed.PAUSE, Deed.DRAIN):
            assert carry_out(home, store, Request(deed, "ada", "why")) and (now := order(home))
            assert (now.who, now.why) == ("ada", "why")
            told = planned(home, Deed.DRAIN)
            assert told == [] or told[-1] == "that ends what ada asked for: merging was paused (why)"
        assert now.kind is Kind.DRAIN
        assert carry_out(home, store, Request(Deed.RESUME, "ada")) == ["the daemon goes on when the queue is finished"]
        assert carry_out(home, store, Request(Deed.RESUME, "ada")) == [] and order(home) is None
    home.order.write_text("{")
    damaged = order(home)
    assert damaged and damaged.kind is Kind.PAUSE and "cannot be read" in damaged.text()


def test_a_home_that_is_busy_or_recovers_finds_the_order_later(home: Home) -> None:
    lock = durable.lock(home.lock)
    try:
        said = ask(home, Request(Deed.PAUSE, "ada"))
        assert "no row tells of it" in said[-1] and (now := order(home)) and now.kind is Kind.PAUSE
        presence = Presence(home)
        presence.starts()
        assert ask(home, Request(Deed.RESUME, "ada"))[0] == "merging goes on" and order(home) is None
        presence.ends()
    finally:
        os.close(lock)


def test_a_pause_is_looked_at_between_two_experts(home: Home) -> None:
    orders = Orders(home, Presence(home), structlog.get_logger(), once=False)
    drops = [Drop(name, name, 0, 1, 9.0) for name in "ab"]
    taken = []
    for drop in orders.until_paused(drops):
        taken.append(drop)
        give(home, Deed.PAUSE, "ada", None)
    assert taken == drops[:1] and orders.allowed(drops, Scan(drops, 0)) == []
