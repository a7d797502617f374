"""What happens to drops while they wait for their turn, and to homes that people have put their hands into."""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from daemon import service
from daemon.arrivals.inbox import Inbox, Scan
from daemon.compute.progress import Progress
from daemon.compute.resources import device
from daemon.config import Compute, load
from daemon.errors import BadConfig, BadHome, NotYet
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.merge.merger import Merger
from daemon.service import Service
from registry import engine
from registry.errors import Busy
from registry.records import Status
from registry.store import Store
from tests.daemon.homes import drain, experts, lineage, live, make_home, put, quick
from tests.models import write_expert


def scan(home: Home) -> Scan:
    return Inbox(home.inbox, 0, lambda: 0.0).scan()


def merger(home: Home, store: Store) -> Merger:
    from threading import Event

    return Merger(home, store, quick(), Progress(Event(), lambda share: None))


def folder(root: Path, base: Path, seed: int) -> Path:
    root.mkdir()
    write_expert(root / "model.safetensors", base, seed)
    return root


def test_a_drop_replaced_while_it_waited_is_looked_at_again(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "a.safetensors", base, 2))
    (drop,) = scan(home).settled
    (home.inbox / "a.safetensors").unlink()
    put(home, write_expert(tmp_path / "a.safetensors", base, 3))
    with Store.open(home.registry) as store:
        taking = merger(home, store)
        with pytest.raises(NotYet):
            taking.take(drop)
        assert experts(home) == [] and (home.inbox / "a.safetensors").exists()
        assert taking.take(scan(home).settled[0]).status is Status.MERGED
        taking.close()


def test_a_note_laid_beside_the_weights_does_not_lose_the_expert(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, folder(tmp_path / "a", base, 2))
    (drop,) = scan(home).settled
    (home.inbox / "a" / "training_args.json").write_text("{}")
    with Store.open(home.registry) as store:
        taking = merger(home, store)
        expert = taking.take(drop)
        taking.close()
    assert expert.status is Status.MERGED
    assert sorted(path.name for path in (home.archive(1) / "a").iterdir()) == [
        "model.safetensors",
        "training_args.json",
    ]
    assert not (home.inbox / "a").exists()


def test_parts_of_an_upload_get_their_patience(home: Home, base: Path, tmp_path: Path) -> None:
    """A first shard without its index, pickles that came before the weights, space that is only reserved."""
    first = folder(home.inbox / "shards", base, 2) / "model.safetensors"
    first.rename(first.with_name("model-00001-of-00002.safetensors"))
    (home.inbox / "early").mkdir()
    (home.inbox / "early" / "optimizer.pt").write_bytes(b"\x80\x04.")
    (home.inbox / "reserved.safetensors").write_bytes(bytes(4096))
    with Store.open(home.registry) as store:
        taking = Merger(home, store, quick(inbox={"patience_seconds": 60}), merger(home, store)._progress)
        for drop in scan(home).settled:
            with pytest.raises(NotYet):
                taking.take(drop)
        taking.close()
    assert experts(home) == []
    drain(home)
    assert [expert.status for expert in experts(home)] == [Status.QUARANTINED] * 3


def test_a_pruned_archive_is_no_problem(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "a.safetensors", base, 2))
    drain(home)
    shutil.rmtree(home.archive(1))
    with lineage(home) as reader:
        assert verify(home, reader, lambda what: None)[1] == []
    put(home, write_expert(tmp_path / "b.safetensors", base, 3))
    drain(home)
    assert live(home) == 2


def test_what_a_person_puts_beside_the_versions_stays(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "a.safetensors", base, 2))
    drain(home)
    shutil.copytree(home.version("main", 1), home.versions("main") / "best-so-far")
    (home.version("main", 1) / ".DS_Store").write_bytes(b"x")
    drain(home)
    assert (home.versions("main") / "best-so-far" / "model.safetensors").exists()


def test_init_never_clears_a_home_that_lost_its_registry(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "a.safetensors", base, 2))
    drain(home)
    home.registry.rename(tmp_path / "registry.sqlite")
    with pytest.raises(BadHome, match="not empty"):
        make_home(home.root, base)
    assert (home.version("main", 1) / "model.safetensors").exists()
    assert (home.archive(1) / "a.safetensors").exists()


def test_nothing_is_merged_onto_a_damaged_base(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "a.safetensors", base, 2))
    drain(home)
    weights = home.base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    put(home, write_expert(tmp_path / "b.safetensors", base, 3))
    with pytest.raises(BadHome, match="base"):
        drain(home)
    assert live(home) == 1 and (home.inbox / "b.safetensors").exists()


def test_a_base_in_a_hubs_cache_is_taken_by_the_links_name(base: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a1b2c3").write_bytes(base.read_bytes())
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "a1b2c3")
    assert make_home(tmp_path / "home", tmp_path / "model.safetensors").exists()


def test_one_underscore_for_two_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_HTTP_PORT", "9000")
    with pytest.raises(BadConfig, match="MAINSTEM_HTTP_PORT") as refused:
        load(None)
    assert "HTTP__PORT" in refused.value.hint


def test_a_device_that_is_not_there_is_refused_at_the_start(home: Home) -> None:
    with pytest.raises(BadConfig, match="0 CUDA devices"):
        device(Compute(device="cuda:0"))
    with pytest.raises(BadConfig):
        drain(home, quick(compute={"device": "cuda"}))


def test_every_name_in_a_dropped_folder_is_durable_before_the_commit(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = write_expert(tmp_path / "a", base, 2)
    (dropped / "below" / "deeper").mkdir(parents=True)
    path = put(home, dropped)
    folders = {one.stat().st_ino for one in (path, path / "below", path / "below" / "deeper")}
    synced: set[int] = set()
    fsync, commit = os.fsync, Store.commit

    def watched(fd: int) -> None:
        fsync(fd)
        synced.add(os.fstat(fd).st_ino)

    def committed(*args: object) -> object:
        assert folders <= synced
        return commit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Store, "commit", committed)
    drain(home)
    assert [one.version for one in experts(home)] == [1]


@pytest.mark.parametrize("when", ["at the start", "in a merge"])
def test_who_drains_once_does_not_wait_for_a_busy_registry_for_ever(
    when: str, home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.02)
    monkeypatch.setattr(service, "ONCE_WAITS_SECONDS", 0.1)
    put(home, write_expert(tmp_path / "a.safetensors", base, 2))
    with closing(sqlite3.connect(home.registry, isolation_level=None)) as other:

        class Held(Service):
            def _take(self, *given: object) -> bool:
                other.execute("BEGIN IMMEDIATE")
                return super()._take(*given)  # type: ignore[arg-type]

        if when == "at the start":
            other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy) as stopped:
            (Service if when == "at the start" else Held)(home, quick()).run(once=True, http=False)
        assert "close it" in stopped.value.hint and os.listdir(home.inbox) == ["a.safetensors"]
        other.execute("ROLLBACK")
    drain(home)
    assert live(home) == 1
