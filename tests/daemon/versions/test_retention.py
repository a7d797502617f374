"""Which versions are kept, and that their numbers and the experts outlive their files."""

import os
import shutil
import sqlite3
from pathlib import Path
from unittest.mock import Mock

import pytest

from daemon.disk import durable
from daemon.home.recovery import recover
from daemon.home.verification import verify
from daemon.layout import STATE_FILE, Home
from daemon.versions import retention
from daemon.versions.checking import problems
from daemon.versions.retention import collect
from registry.records import Deed, NewIntervention
from registry.store import Store
from tests.daemon.homes import drain, experts, latest, lineage, make_home, put, quick
from tests.models import write_expert


@pytest.fixture
def six(base: Path, tmp_path: Path) -> Home:
    """Two heads at version 6, everything kept so far."""
    home = make_home(tmp_path / "home", base, [("main", "opcm", {}), ("soup", "mean", {})])
    for seed in range(6):
        put(home, write_expert(tmp_path / "e.safetensors", base, seed + 2), f"{seed}.safetensors")
    drain(home)
    return home


def kept(home: Home, head: str) -> list[str]:
    return sorted(path.name for path in home.versions(head).iterdir() if path.is_dir() and not path.is_symlink())


def test_within_the_grace_time_everything_is_kept(six: Home) -> None:
    assert kept(six, "main") == [f"{n:06d}" for n in range(7)]
    with Store.open(six.registry) as store:
        assert collect(six, store, quick(retention={"versions": 1}).retention) == []


def test_afterwards_the_newest_the_live_and_the_base_are_kept(six: Home) -> None:
    settings = quick(retention={"versions": 2, "grace_seconds": 0})
    with Store.open(six.registry) as store:
        gone = collect(six, store, settings.retention)
        assert collect(six, store, settings.retention) == []
    assert {(version.head, version.number) for version in gone} == {
        (h, n) for h in ("main", "soup") for n in (1, 2, 3, 4)
    }
    for head in ("main", "soup"):
        assert kept(six, head) == ["000000", "000005", "000006"]
    assert latest(six)
    with lineage(six) as reader:
        assert [version.number for version in reader.versions("main", newest_first=False)] == list(range(7))
        assert verify(six, reader, lambda what: None)[1] == []
    assert all(list(six.archive(expert.id).iterdir()) for expert in experts(six))


def test_the_newest_states_stay(six: Home) -> None:
    """The next merge reads the newest; the one before it, whoever takes the last expert out. What is published of the
    others stays for its readers all the same.
    """
    for head in ("main", "soup"):
        assert sorted(os.listdir(six.states(head))) == ["000005", "000006"]
        assert kept(six, head) == [f"{n:06d}" for n in range(7)]
    with lineage(six) as reader:
        assert verify(six, reader, lambda what: None)[1] == []
        (six.head_state("soup", 6) / STATE_FILE).unlink()
        (problem,) = verify(six, reader, lambda what: None)[1]
    assert problem.startswith("state/heads/soup/000006/state.safetensors: No such file")


def test_a_state_goes_only_once_its_successor_is_committed(six: Home, base: Path, tmp_path: Path) -> None:
    """Every removal is watched: the newest version of the registry has its state then, whole."""
    put(six, write_expert(tmp_path / "e.safetensors", base, 60))
    removed: list[tuple[str, int]] = []
    remove = durable.remove

    def watching(path: Path) -> None:
        if path.parent in (six.states("main"), six.states("soup")) and path.exists():
            with lineage(six) as reader:
                head = reader.head(path.parent.name)
                assert head and int(path.name) < head.newest - 1
                version = reader.version(head.name, head.newest)
                assert version and problems(six, version, hashes=True) == []
            removed.append((path.parent.name, int(path.name)))
        remove(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "remove", watching)
        drain(six)
    assert removed == [("main", 5), ("soup", 5)]


def test_states_that_an_older_mainstem_left_go_at_the_start(six: Home) -> None:
    shutil.copytree(six.head_state("main", 6), six.head_state("main", 4))
    with Store.open(six.registry) as store:
        recover(six, store, lambda *_, **__: None)
    assert sorted(os.listdir(six.states("main"))) == ["000005", "000006"]


def test_views_are_read_from_the_states_of_old_versions(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base, [("main", "emr", {}), ("soup", "mean", {})])
    for seed in range(3):
        put(home, write_expert(tmp_path / "e.safetensors", base, seed + 2), f"{seed}.safetensors")
    drain(home)
    assert sorted(os.listdir(home.states("main"))) == ["000001", "000002", "000003", "views"]
    assert sorted(os.listdir(home.states("soup"))) == ["000002", "000003"]
    with lineage(home) as reader:
        assert verify(home, reader, lambda what: None)[1] == []


def test_the_states_of_what_is_live_and_of_what_is_pinned_stay_too(six: Home, base: Path, tmp_path: Path) -> None:
    deed = NewIntervention(Deed.PIN, "ann", head="main", version=5)
    with Store.open(six.registry) as store:
        store.pin("main", 5, True, deed)
        store.turn("soup", 5, NewIntervention(Deed.ROLLBACK, "ann", head="soup", version=5), "rolled back")
    for seed in range(3):
        put(six, write_expert(tmp_path / "e.safetensors", base, seed + 20), f"more{seed}.safetensors")
    drain(six, quick(retention={"versions": 1, "grace_seconds": 0}))
    assert kept(six, "main") == ["000000", "000005", "000009"]
    assert kept(six, "soup") == ["000000", "000005", "000006", "000009"]  # and what was live before
    for head in ("main", "soup"):
        assert sorted(os.listdir(six.states(head))) == ["000005", "000009"]


def test_what_an_expert_was_trained_from_stays(six: Home, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    write_expert(folder / "model.safetensors", base, 30)
    (folder / "expert.json").write_text('{"trained_from": "soup/4"}')
    put(six, folder)
    drain(six)
    drain(six, quick(retention={"versions": 1, "grace_seconds": 0}))
    assert kept(six, "soup") == ["000000", "000004", "000007"] and kept(six, "main") == ["000000", "000007"]


def test_what_a_crash_left_of_a_collected_version_goes(six: Home) -> None:
    """By its folders: that there are many rows of collected versions costs nothing."""
    with Store.open(six.registry) as store:
        store.collected("main", 2)
        store.collected("soup", 3)
        shutil.rmtree(six.version("soup", 3))
        shutil.copytree(six.head_state("soup", 6), six.head_state("soup", 3))
        recover(six, store, lambda *_, **__: None)
    assert "000002" not in kept(six, "main") and not six.head_state("soup", 3).exists()


def test_the_daemon_collects_as_it_goes_and_merging_goes_on(six: Home, base: Path, tmp_path: Path) -> None:
    put(six, write_expert(tmp_path / "e.safetensors", base, 50))
    drain(six, quick(retention={"versions": 1, "grace_seconds": 0}))
    assert kept(six, "main") == ["000000", "000007"]
    put(six, write_expert(tmp_path / "e.safetensors", base, 51))
    drain(six, quick(retention={"versions": 1, "grace_seconds": 0}))
    assert kept(six, "soup") == ["000000", "000008"]


def test_the_grace_runs_from_the_successor_not_from_the_version_itself(six: Home) -> None:
    """A version may have been live for a week: its readers get the grace time once it is followed."""
    with sqlite3.connect(six.registry) as raw:
        raw.execute("UPDATE versions SET created_at = datetime('now', '-7 days') WHERE number <= 3")
    raw.close()
    with Store.open(six.registry) as store:
        gone = collect(six, store, quick(retention={"versions": 1, "grace_seconds": 3600}).retention)
    assert {version.number for version in gone} == {1, 2}  # version 3 was followed just now


def aged(home: Home, seconds: int) -> None:
    """As if all versions had come so long ago."""
    with sqlite3.connect(home.registry) as raw:
        raw.execute("UPDATE versions SET created_at = datetime('now', ?)", (f"-{seconds} seconds",))
    raw.close()


def test_a_burst_takes_no_more_than_its_share(six: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the grace time alone: of what is set, or a tenth of what is free. What was followed within the last minute
    stays whatever it takes."""
    with Store.open(six.registry) as store:
        each = sum(store.version(head, 6).size_bytes for head in ("main", "soup"))  # type: ignore[union-attr]
        tight = quick(retention={"versions": 2, "grace_bytes": 3 * each}).retention
        aged(six, 50)
        assert collect(six, store, tight) == []
        aged(six, 70)
        assert {version.number for version in collect(six, store, tight)} == {1}
        assert collect(six, store, tight) == []
        usual = quick(retention={"versions": 1}).retention
        assert collect(six, store, usual) == [], "there is room for all"
        free = [25 * each]
        monkeypatch.setattr(retention.shutil, "disk_usage", lambda _: Mock(free=free[0]))
        assert {version.number for version in collect(six, store, usual)} == {2, 3}, "a tenth of 25 + 4"
        assert kept(six, "main") == kept(six, "soup") == ["000000", "000004", "000005", "000006"]
        free[0] = 0
        assert {version.number for version in collect(six, store, usual)} == {4, 5}
    assert kept(six, "main") == ["000000", "000006"]
