"""`mainstem gc`: what retention no longer keeps is said, and goes, beside the daemon and without it."""

import os
from pathlib import Path

import pytest

from daemon.config import Retention
from daemon.home.verification import verify
from daemon.interventions.collecting import planned, remove
from daemon.interventions.deeds import Request, carry_out
from daemon.layout import Home
from daemon.versions import retention
from registry.records import Deed, NewIntervention, Version
from registry.store import Store
from tests.daemon.homes import lineage
from tests.daemon.interventions.test_rollback import did, there
from tests.daemon.processes import running, until

KEEP_ONE = "[retention]\nversions = 1\ngrace_seconds = 0\n"


def kept(home: Home) -> list[list[str]]:
    folders = [home.versions("main"), home.states("main"), home.versions("soup")]
    return [sorted(name for name in os.listdir(folder) if name.isdecimal()) for folder in folders]


def test_what_a_dry_run_says_goes(merged: Home) -> None:
    """main/2 is pinned, soup is rolled back to 1."""
    assert did(merged, "gc", "--dry-run").startswith("nothing is to be removed")
    with Store.open(merged.registry) as store:
        carry_out(merged, store, Request(Deed.PIN, "ada", head="main", version=2))
        carry_out(merged, store, Request(Deed.ROLLBACK, "ada", head="soup", version=1))
    (merged.root / "mainstem.toml").write_text(KEEP_ONE)
    before = there(merged)
    said = did(merged, "gc", "--dry-run")
    assert there(merged) == before
    going = [line.partition(":")[0] for line in said.splitlines()[:-1]]
    assert going == ["main/1", "main/3", "main/3", "soup/2", "soup/3", "soup/3"]
    assert said.splitlines()[-1].startswith("4 versions and 2 states in all, ")
    assert did(merged, "gc") == said
    assert kept(merged) == [["000000", "000002", "000004"], ["000004"], ["000000", "000001", "000004"]]
    with lineage(merged) as reader:
        assert verify(merged, reader, lambda _: None)[1] == []
        assert planned(merged, reader, Retention(versions=1, grace_seconds=0)) == []
        assert [done.deed for done in reader.interventions()] == [Deed.ROLLBACK, Deed.PIN]


def test_before_each_version_that_goes_the_loop_shows_that_it_goes_on(merged: Home) -> None:
    shown: list[int] = []
    with Store.open(merged.registry) as store:
        gone = remove(merged, store, Retention(versions=1, grace_seconds=0), lambda: shown.append(1))
    assert len(shown) == sum("of state" not in line for line in gone[:-1]) > 2


def test_beside_a_daemon_its_own_settings_count(merged: Home) -> None:
    config = merged.root / "mainstem.toml"
    config.write_text(KEEP_ONE)
    with Store.open(merged.registry) as store:
        carry_out(merged, store, Request(Deed.PIN, "ada", head="main", version=1))
    with running("run", "--home", merged.root, "--no-http") as daemon:
        assert until(lambda: any('"ready"' in line for line in daemon.lines), 30)
        config.write_text("")
        did(merged, "unpin", "main/1")
        assert did(merged, "gc", "--dry-run").startswith("nothing is to be removed")
        assert did(merged, "gc").splitlines()[-2].startswith("main/1: ")
        assert kept(merged) == [["000000", "000004"], ["000004"], ["000000", "000004"]]
        assert daemon.stop() == 0


def test_a_version_that_is_pinned_in_that_moment_stays(merged: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    found = retention.expired
    pinned = NewIntervention(Deed.PIN, "ada", head="main", version=2)

    with Store.open(merged.registry) as store:

        def late(*asked: object) -> list[Version]:
            going = found(*asked)  # type: ignore[arg-type]
            if any((version.head, version.number) == ("main", 2) for version in going):
                store.pin("main", 2, True, pinned)
            return going

        monkeypatch.setattr(retention, "expired", late)
        gone = retention.collect(merged, store, Retention(versions=1, grace_seconds=0))
    assert ("main", 2) not in {(version.head, version.number) for version in gone} and len(gone) == 5
    assert Path(merged.version("main", 2) / "manifest.json").exists()
