"""What is going on in a home, in words."""

import os
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from daemon.disk import durable
from daemon.home.condition import DAMAGED, LONGEST, NONE, WAITING, Condition, condition
from daemon.home.health import Health, Trouble
from daemon.home.presence import Doing, Presence
from daemon.home.presence import running as look
from daemon.http.pages.now import spoken
from daemon.layout import Home
from registry.reader import Reader
from tests.daemon.homes import make_home
from tests.models import write_base


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("condition")
    return make_home(root / "home", write_base(root / "base.safetensors", seed=1))


def now(home: Home, later: timedelta = timedelta()) -> Condition:
    with Reader.open(home.registry) as reader:
        return condition(home, reader, datetime.now(UTC) + later)


def test_how_far_it_is_what_is_left_and_what_waits_longest_first(home: Home) -> None:
    assert (now(home).doing, now(home).waiting) == (NONE, [])
    presence = Presence(home)
    with os.fdopen(durable.lock(home.lock)):
        presence.starts()
        assert now(home).doing == Doing.RECOVERING
        presence.watches()
        assert (now(home).doing, now(home).text) == (Doing.WATCHING, "idle: nothing waits")
        before, later = home.inbox / "b", home.inbox / "a"
        before.mkdir()
        later.mkdir()
        while later.stat().st_ctime_ns == before.stat().st_ctime_ns:  # the file system's clock ticks slowly
            os.utime(later)
        assert [one.name for one in now(home).waiting or []] == ["b", "a"]
        with presence.merging("b"):
            presence.progresses(0.0)
            assert now(home).left_seconds is None, "nothing can be foretold"
            presence.progresses(0.9)
            assert now(home).share == 0.0, "it is noted now and then"
            presence._share_said -= 2  # seconds later
            presence.progresses(0.25)
            started = look(home)
            assert started and started.merging_since
            found = now(home, timedelta(seconds=30))
            assert (found.doing, found.expert, found.share) == (Doing.MERGING, "b", 0.25)
            assert found.left_seconds and 85 < found.left_seconds < 100
            assert found.text.startswith("merging b: 25%, about ") and found.text.endswith("left")
            with presence.evaluating():
                found = now(home, timedelta(seconds=30))
                assert (found.doing, found.expert, found.left_seconds) == (Doing.EVALUATING, "b", None)
                assert re.fullmatch(r"evaluating what comes of b, for [34]\d s", found.text)
                assert found.daemon and found.since
                assert found.since.isoformat(timespec="seconds") == found.daemon.evaluating_since
                assert (
                    found.waiting and found.waiting[0].why == f"being evaluated since {found.daemon.evaluating_since}"
                )
            assert now(home).doing == Doing.MERGING
        assert (now(home).doing, now(home).expert, now(home).share) == (Doing.WATCHING, None, None)
        presence.wrong([Trouble("disk_full", "the disk is full", "make room")])
        assert (now(home).doing, now(home).text) == (WAITING, "the disk is full")
        assert pill(now(home)) == ("waiting for disk", "bad")
        (home.root / "published" / "main" / "000000" / "model.safetensors").rename(home.root / "aside")
        assert now(home).doing == DAMAGED and "main/0" in now(home).text
        (home.root / "aside").rename(home.root / "published" / "main" / "000000" / "model.safetensors")
        presence.ends()
    for name in ("b", "a"):
        (home.inbox / name).rmdir()


def pill(found: Condition) -> tuple[str, str]:
    said = spoken(found, [], {}, 0)
    return said.pill, said.tone


def test_settings_that_could_not_be_read_again_are_told_of_and_hinder_nothing(home: Home) -> None:
    presence = Presence(home)
    with os.fdopen(durable.lock(home.lock)):
        presence.starts()
        presence.watches()
        presence.unread(f"there is no setting evaluat (in {home.config})")
        found = now(home)
        (one,) = found.troubles
        assert (found.doing, one.reason) == (Doing.WATCHING, "settings") and "mainstem config check" in one.hint
        assert one.text.endswith("there is no setting evaluat (in mainstem.toml)")
        with Reader.open(home.registry) as reader:
            assert Health(home).troubles(reader, beside=True) == [], "it is as ready as ever"
        presence.unread(None)
        assert now(home).troubles == []
        presence.ends()


def test_it_is_ready_for_json(home: Home) -> None:
    found = now(home)
    assert found.doing == "no daemon" and found.since is None and found.queue() == []
    assert replace(found, waiting=None).queue() is None


def test_of_a_flood_only_so_many_are_looked_at(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert LONGEST >= 1000
    monkeypatch.setattr("daemon.home.condition.LONGEST", 3)
    for n in range(5):
        (home.inbox / f"{n}").mkdir()
    assert len(now(home).waiting or []) == 3
    for n in range(5):
        (home.inbox / f"{n}").rmdir()
