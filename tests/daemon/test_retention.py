"""Which versions are kept, and that their numbers and the experts outlive their files."""

import os
import sqlite3
from pathlib import Path

import pytest

from daemon.home import Home
from daemon.retention import collect
from daemon.verification import verify
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
        assert sorted(os.listdir(six.states(head))) == ["000005", "000006"]
    assert latest(six)
    with lineage(six) as reader:
        assert [version.number for version in reader.versions("main", newest_first=False)] == list(range(7))
        assert verify(six, reader, lambda what: None)[1] == []
    assert all(list(six.archive(expert.id).iterdir()) for expert in experts(six))


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
