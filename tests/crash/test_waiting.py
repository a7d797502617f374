"""What the daemon waits for instead of ending: a registry that is held, an inbox that is gone; and stops meanwhile."""

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx

from daemon.layout import Home
from tests.crash.daemons import Running
from tests.crash.worlds import World, fill_inbox, outcome, settle, watch
from tests.daemon.homes import experts

PATIENCE_SECONDS = 60.0
HELD = "another program holds the registry: waiting for it"


def until(condition: Callable[[], bool], daemon: Running) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert daemon.running and time.monotonic() < deadline, daemon.log
        time.sleep(0.01)


def ready(world: World, home: Home, *, http: bool = False) -> tuple[Running, str]:
    """A daemon that is ready, and its address where it has one."""
    daemon = world.zygote.start(*(["run", "--port", "0", "--home", home.root] if http else watch(home)))
    until(lambda: '"ready"' in daemon.log, daemon)
    urls = [json.loads(line)["url"] for line in daemon.log.splitlines() if '"listening"' in line]
    return daemon, urls[0] if urls else ""


@contextmanager
def held(home: Home) -> Iterator[None]:
    """Another program has the registry's write lock."""
    with closing(sqlite3.connect(home.registry, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def test_a_registry_that_is_held_is_waited_for(world: World, expected: dict[str, object], tmp_path: Path) -> None:
    home = world.home(tmp_path / "home", fill=False)
    daemon, url = ready(world, home, http=True)
    for path in world.drops:  # every kind of change: commits, refusals, places, collections
        before = daemon.log.count(HELD)
        with held(home):
            fill_inbox(home, [path])
            until(lambda before=before: daemon.log.count(HELD) > before, daemon)  # type: ignore[misc]
            refused = httpx.get(f"{url}readyz")
            assert refused.status_code == 503 and "holds the registry" in refused.text
            assert "mainstem_registry_busy 1.0" in httpx.get(f"{url}metrics").text
        until(lambda: not os.listdir(home.inbox), daemon)
    assert httpx.get(f"{url}readyz").status_code == 200
    assert "mainstem_registry_busy 0.0" in httpx.get(f"{url}metrics").text
    assert settle(home, daemon, len(world.drops)).code == 0
    world.finish(home, {})
    assert outcome(home) == expected


def test_sigterm_ends_the_wait_for_a_registry(world: World, expected: dict[str, object], tmp_path: Path) -> None:
    home = world.home(tmp_path / "home")
    with held(home):
        starting = world.zygote.start(*watch(home))
        until(lambda: HELD in starting.log, starting)
        os.kill(starting.pid, signal.SIGTERM)
        assert starting.wait().code == 0
    merging, _ = ready(world, world.home(tmp_path / "other", fill=False))
    other = Home(tmp_path / "other")
    with held(other):
        fill_inbox(other, world.drops)
        until(lambda: HELD in merging.log, merging)
        os.kill(merging.pid, signal.SIGTERM)
        assert merging.wait().code == 0
    for one in (home, other):
        world.finish(one, {})
        assert outcome(one) == expected


def test_an_inbox_that_is_replaced_is_listed_and_one_that_is_gone_is_waited_for(world: World, tmp_path: Path) -> None:
    home = world.home(tmp_path / "home", fill=False)
    daemon, url = ready(world, home, http=True)
    home.inbox.rename(tmp_path / "old")
    home.inbox.mkdir()
    fill_inbox(home, world.drops[:1])
    until(lambda: home.archive(1).exists() and not os.listdir(home.inbox), daemon)
    until(lambda: "the inbox is another folder now" in daemon.log, daemon)  # it may list before it looks again
    home.inbox.rename(tmp_path / "away")
    until(lambda: httpx.get(f"{url}readyz").status_code == 503, daemon)
    assert "is gone" in httpx.get(f"{url}readyz").text
    (tmp_path / "away").rename(home.inbox)
    fill_inbox(home, world.drops[1:2])
    until(lambda: home.archive(2).exists() and not os.listdir(home.inbox), daemon)
    assert httpx.get(f"{url}readyz").status_code == 200
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait().code == 0
    assert [(one.name, one.version) for one in experts(home)] == [("a.safetensors", 1), ("b", 2)]
