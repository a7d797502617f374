"""What a home says is wrong with it: each thing by its word, several at once, and nothing once it is mended."""

import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from daemon.arrivals import receiving
from daemon.disk import durable
from daemon.home import health
from daemon.home.health import Health, Trouble
from daemon.interventions.deeds import Request, carry_out
from daemon.layout import MANIFEST, Home
from registry.errors import Busy
from registry.reader import Reader
from registry.records import Deed
from registry.store import Store
from tests.daemon.homes import drain, put
from tests.daemon.processes import running, until
from tests.models import write_expert


@pytest.fixture
def merged(home: Home, base: Path, tmp_path: Path) -> Home:
    put(home, write_expert(tmp_path / "one.safetensors", base, 2))
    drain(home)
    return home


@pytest.fixture
def reader(merged: Home) -> Iterator[Reader]:
    with Reader.open(merged.registry) as reader:
        yield reader


def reasons(home: Home, reader: Reader, *, beside: bool = False) -> list[str]:
    found = Health(home).troubles(reader, beside=beside)
    assert not [trouble for trouble in found if str(home.root) in trouble.text + trouble.hint]
    return [trouble.reason for trouble in found]


def test_a_sound_home_has_none(merged: Home, reader: Reader) -> None:
    assert reasons(merged, reader) == []


def test_files_of_the_live_version(merged: Home, reader: Reader) -> None:
    """Gone, cut short, or something else by that name; the manifest itself too, also once it is known."""
    live = merged.version("main", 1)
    for name in (MANIFEST, "model.safetensors"):
        path = live / name
        kept = path.read_bytes()
        for harm in ("gone", "short", "link"):
            path.unlink(missing_ok=True)
            if harm == "short":
                path.write_bytes(kept[:-1])
            elif harm == "link":
                path.symlink_to("/dev/null")
            (trouble,) = Health(merged).troubles(reader)
            assert (trouble.reason, name in trouble.text) == ("damaged", True)
        path.unlink()
        path.write_bytes(kept)
        assert reasons(merged, reader) == []
    (merged.version("main", 0) / MANIFEST).unlink()
    assert reasons(merged, reader) == [], "that one is not live"
    shutil.rmtree(live)
    assert reasons(merged, reader) == ["damaged"]


def test_files_of_the_newest_version_where_another_is_live(merged: Home, reader: Reader) -> None:
    with Store.open(merged.registry) as store:
        assert carry_out(merged, store, Request(Deed.ROLLBACK, "ada", head="main", version=0))
    assert reasons(merged, reader) == []
    (merged.version("main", 1) / "model.safetensors").write_bytes(b"")
    (trouble,) = Health(merged).troubles(reader)
    assert trouble.reason == "damaged" and trouble.text.startswith("main/1: ")
    (merged.version("main", 0) / "model.safetensors").write_bytes(b"")
    assert reasons(merged, reader) == ["damaged", "damaged"]


def test_a_head_that_moves_on_meanwhile_is_not_damaged(
    merged: Home, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = reader.heads()
    with sqlite3.connect(merged.registry) as registry:
        registry.execute("UPDATE heads SET live = 0")
    shutil.rmtree(merged.version("main", 1))
    monkeypatch.setattr(Reader, "heads", lambda _: before)
    assert reasons(merged, reader) == []


def test_the_inbox(merged: Home, reader: Reader) -> None:
    merged.inbox.rmdir()
    assert reasons(merged, reader) == ["no_inbox"]
    merged.inbox.write_bytes(b"")
    assert reasons(merged, reader) == ["no_inbox"]


def test_what_is_stuck_in_the_inbox(merged: Home, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect(merged.registry) as registry:
        registry.execute("UPDATE experts SET place = NULL")
    assert reasons(merged, reader) == [], "it may be moved at this moment"
    monkeypatch.setattr(health, "STUCK", -health.STUCK)
    assert reasons(merged, reader) == [], "the archive has a copy of it"
    shutil.rmtree(merged.archive(1))
    (trouble,) = Health(merged).troubles(reader)
    assert (trouble.reason, "one.safetensors" in trouble.text) == ("stuck", True)
    assert f"into archive/{merged.archive(1).name}/ of the home" in trouble.hint


def test_the_disk(merged: Home, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "RESERVE_BYTES", 1 << 60)
    assert reasons(merged, reader) == ["disk_full"]
    assert receiving.RESERVE_BYTES < 1 << 30


def test_a_busy_registry(merged: Home, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_: Reader) -> None:
        raise Busy(f"{merged.registry}: locked", "close it")

    monkeypatch.setattr(Reader, "heads", busy)
    (trouble,) = Health(merged).troubles(reader)
    assert trouble == Trouble("registry", "the registry is busy", "close it")


def test_several_at_once_and_what_is_noted(merged: Home, reader: Reader) -> None:
    merged.inbox.rmdir()
    (merged.version("main", 1) / MANIFEST).unlink()
    found = Health(merged)
    found.note(Trouble("disk_full", "merging waits", "make room"))
    assert [one.reason for one in found.troubles(reader, beside=True)] == [
        *("disk_full", "damaged", "no_inbox", "no_daemon")
    ]
    found.clear("disk_full")
    assert [one.reason for one in found.troubles(reader)] == ["damaged", "no_inbox"]


def test_what_is_noted_while_the_registry_is_read(
    merged: Home, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's own thread notes what it sees while another one asks: it is told of all the same, and once."""
    found, heads = Health(merged), Reader.heads

    def meanwhile(self: Reader) -> object:
        found.note(Trouble("no_inbox", "the inbox is gone", "make it"))
        return heads(self)

    merged.inbox.rmdir()
    monkeypatch.setattr(Reader, "heads", meanwhile)
    assert [one.reason for one in found.troubles(reader)] == ["no_inbox"]
    assert [one.reason for one in found.troubles(reader)] == ["no_inbox"]


def test_looking_for_a_daemon_keeps_none_from_starting(merged: Home) -> None:
    """The look takes the lock for a moment; whoever wants it for good waits for that long."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            durable.is_locked(merged.lock)

    assert not durable.is_locked(merged.lock)
    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(50):
            fd = durable.lock(merged.lock)
            assert durable.is_locked(merged.lock)
            os.close(fd)
        fd = durable.lock(merged.lock)
        with pytest.raises(BlockingIOError):
            durable.lock(merged.lock)
        os.close(fd)
    finally:
        over.set()
        for looker in lookers:
            looker.join()


def test_behind_serve(home: Home) -> None:
    """No daemon, one, none again; the page says it too."""
    with running("serve", "--home", home.root, "--port", "0") as serving:

        def told() -> list[str]:
            answer: httpx.Response = serving.get("/readyz")
            return [one["reason"] for one in answer.json().get("troubles", [])] if answer.status_code == 503 else []

        assert told() == ["no_daemon"]
        assert "no daemon runs on this home" in serving.get("/").text
        events = {"url": serving.origin + "/v1/events", "trust_env": False, "verify": False}
        with httpx.stream("GET", **events) as told_of:
            said = next(line for line in told_of.iter_lines() if line.startswith("data: "))
            assert '"doing": "no daemon"' in said
        with running("run", "--home", home.root, "--no-http") as daemon:
            assert until(lambda: told() == [], 60)
            assert until(lambda: 'id="pill"><bdi>idle<' in serving.get("/").text, 60)
            daemon.process.send_signal(signal.SIGKILL)
            daemon.process.wait()
        assert until(lambda: told() == ["no_daemon"], 30)
        home.inbox.rename(home.root / "elsewhere")
        assert told() == ["no_inbox", "no_daemon"]
        assert serving.get("/").text.count('role="alert"') == 2
