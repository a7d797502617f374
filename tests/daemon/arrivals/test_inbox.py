"""The inbox: what counts as an entry, when it has come to rest, and in which order."""

import errno
import os
import shutil
import tempfile
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from daemon.arrivals.inbox import Held, Inbox, Scan, Watcher, entry_id
from daemon.arrivals.inbox_folder import Watching
from daemon.checkpoints.opening import stamp
from daemon.layout import Home
from daemon.service import Service
from registry.records import Status
from tests.daemon.homes import experts, make_home, put, quick
from tests.models import write_expert
from tests.nobody import as_nobody


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def inbox(tmp_path: Path, clock: Clock) -> Inbox:
    return Inbox(tmp_path, 2.0, clock)


def names(inbox: Inbox) -> list[str]:
    return [drop.name for drop in inbox.scan().settled]


@pytest.mark.parametrize("name", [".hidden", "x.lock", "x.swp", "x~", "x.part", ".line\nbreak", "line\nbreak.part"])
def test_uploaders_temporary_names_do_not_count(inbox: Inbox, tmp_path: Path, clock: Clock, name: str) -> None:
    (tmp_path / name).touch()
    inbox.scan()
    clock.now = 100
    scan = inbox.scan()
    assert scan.settled == [] and scan.moving == 0


def test_an_entry_settles_once_nothing_has_changed_for_long_enough(inbox: Inbox, tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1")
    scan = inbox.scan()
    assert (scan.settled, scan.moving) == ([], 1)
    clock.now = 1.9
    assert names(inbox) == []
    path.write_bytes(b"12")
    clock.now = 2.1
    assert names(inbox) == []
    clock.now = 4.0
    assert names(inbox) == []
    clock.now = 4.2
    (drop,) = inbox.scan().settled
    assert (drop.name, drop.size_bytes) == ("x", 2) and drop.rest_seconds == pytest.approx(2.1)
    assert drop.entry == entry_id(path) and drop.mtime_ns == path.stat().st_mtime_ns


def test_a_new_file_under_an_old_name_starts_over(inbox: Inbox, tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "x").write_bytes(b"1")
    before = (tmp_path / "x").stat()
    inbox.scan()
    clock.now = 3
    (tmp_path / "y").write_bytes(b"2")
    os.utime(tmp_path / "y", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "y").rename(tmp_path / "x")  # same size, same time, another inode
    assert names(inbox) == []


def test_a_folder_moves_while_any_file_in_it_does(inbox: Inbox, tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "a").write_bytes(b"123")
    inbox.scan()
    clock.now = 3
    (folder / "b").write_bytes(b"4")
    assert names(inbox) == []
    clock.now = 4
    with (folder / "a").open("ab") as file:
        file.write(b"5")
    clock.now = 5.5
    assert names(inbox) == []
    clock.now = 7.6
    assert [drop.size_bytes for drop in inbox.scan().settled] == [5]


def test_a_folder_moves_while_anything_below_it_does(inbox: Inbox, tmp_path: Path, clock: Clock) -> None:
    deep = tmp_path / "x" / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "weights").write_bytes(b"1")
    inbox.scan()
    clock.now = 3
    (deep / "weights").write_bytes(b"12")
    assert names(inbox) == []
    clock.now = 5.1
    assert [drop.size_bytes for drop in inbox.scan().settled] == [2]
    (deep / "c").mkdir()
    assert names(inbox) == []


def test_who_may_read_it_counts_as_a_change(inbox: Inbox, tmp_path: Path, clock: Clock) -> None:
    for name in ("file", "folder/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    inbox.scan()
    clock.now = 3
    assert names(inbox) == ["file", "folder"]
    (tmp_path / "file").chmod(0o600)
    (tmp_path / "folder" / "file").chmod(0o600)
    assert names(inbox) == []
    clock.now = 5.1
    assert names(inbox) == ["file", "folder"]


def test_a_look_costs_one_stat_for_each_file_and_opens_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox(tmp_path, 0, lambda: 0.0)
    for n in range(50):
        (tmp_path / "x" / f"{n % 5}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / f"{n % 5}" / f"{n}").touch()
    listed: list[object] = []
    scandir = os.scandir

    def watched(path: Path) -> object:
        listed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", watched)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("a file was opened"))
    assert names(inbox) == ["x"]
    assert len(listed) == 6  # each folder once


def test_what_a_note_beside_it_or_a_file_in_it_holds_back(inbox: Inbox, tmp_path: Path, clock: Clock) -> None:
    part = tmp_path / "hub" / ".cache" / "huggingface" / "download" / "q1.incomplete"
    part.parent.mkdir(parents=True)
    for path in (part, tmp_path / "x.safetensors", tmp_path / "x.safetensors.aria2", tmp_path / "hub" / "_READY"):
        path.touch()
    inbox.scan()
    clock.now = 1000
    scan = inbox.scan()
    assert (scan.settled, scan.moving) == ([], 0)
    assert sorted(scan.held, key=lambda held: held.name) == [
        Held("hub", "hub/.cache/huggingface/download/q1.incomplete", 1000),
        Held("x.safetensors", "x.safetensors.aria2", 1000),
    ]
    (tmp_path / "x.safetensors.aria2").unlink()
    part.rename(tmp_path / "hub" / "model.safetensors")
    assert sorted(names(inbox)) == ["hub", "x.safetensors"]  # the marker, and a file that has long been at rest
    assert inbox.scan().held == []


def test_a_note_that_comes_late_starts_the_wait_anew_once_it_is_gone(
    inbox: Inbox, tmp_path: Path, clock: Clock
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y.part").touch()
    inbox.scan()
    clock.now = 10
    (tmp_path / "x" / "y.part").rename(tmp_path / "x" / "y")
    assert names(inbox) == []
    clock.now = 12.1
    assert names(inbox) == ["x"]


@pytest.mark.parametrize("mtime", [0, 10**9, 2**33])
def test_the_clock_of_whoever_writes_does_not_matter(inbox: Inbox, tmp_path: Path, clock: Clock, mtime: int) -> None:
    """As of a file server that is years behind or ahead, or of a copy that keeps the times of long ago."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "file", folder / "file", folder):
        path.touch()
        os.utime(path, (mtime, mtime))
    assert names(inbox) == []
    clock.now = 1.9
    assert names(inbox) == []
    clock.now = 2.1
    assert names(inbox) == ["file", "folder"]


def test_the_ready_marker_ends_the_wait(inbox: Inbox, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert names(inbox) == []
    (tmp_path / "x" / "_READY").touch()
    assert names(inbox) == ["x"]


def test_the_oldest_comes_first_and_names_decide_between_equals(tmp_path: Path, clock: Clock) -> None:
    inbox = Inbox(tmp_path, 0, clock)
    for name, seconds in (("c", 5), ("b", 9), ("a", 9), ("z", 1)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    assert names(inbox) == ["z", "c", "a", "b"]


def test_links_are_not_followed_and_odd_things_do_not_disturb(tmp_path: Path, clock: Clock) -> None:
    inbox = Inbox(tmp_path, 0, clock)
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "nowhere").symlink_to("missing")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "loop").symlink_to("..")
    assert set(names(inbox)) == {"loop", "nowhere", "fifo", "folder"}


def test_what_is_to_be_skipped_neither_settles_nor_moves(tmp_path: Path, clock: Clock) -> None:
    inbox = Inbox(tmp_path, 0, clock)
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    scan = inbox.scan(skip={entry_id(tmp_path / "a")})
    assert [drop.name for drop in scan.settled] == ["b"] and scan.moving == 0


def test_a_scan_survives_entries_that_come_and_go(tmp_path: Path, clock: Clock) -> None:
    inbox = Inbox(tmp_path, 0, clock)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "y").touch()
            (tmp_path / "x" / "y").unlink()
            (tmp_path / "x").rmdir()
            (tmp_path / "x").touch()
            (tmp_path / "x").unlink()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(2000):
            inbox.scan()
    finally:
        stop.set()
        thread.join()


def test_a_stamp_sees_a_write_that_restores_the_time(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1")
    before = path.stat()
    path.write_bytes(b"2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stamp(before)[:4] == stamp(path.stat())[:4]
    assert stamp(before) != stamp(path.stat())


def test_the_watcher_wakes_for_changes_and_not_for_reading(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"1")
    wake = threading.Event()
    watcher = Watcher(tmp_path, wake)
    watcher.start()
    try:
        (tmp_path / "old").read_bytes()
        assert not wake.wait(0.3)
        (tmp_path / "new").write_bytes(b"2")
        assert wake.wait(10)
    finally:
        watcher.stop()


def test_a_folder_that_takes_the_inboxs_place_is_listened_to(home: Home, tmp_path: Path) -> None:
    wake = Event()
    watching = Watching(home, wake, events=True)
    try:
        assert watching.look() is None
        home.inbox.rename(tmp_path / "away")
        assert "is gone" in (watching.look() or "")
        home.inbox.touch()
        assert "no folder" in (watching.look() or "")
        home.inbox.unlink()
        home.inbox.mkdir()
        assert watching.look() is None
        wake.clear()
        (home.inbox / "x").touch()
        assert wake.wait(30)
    finally:
        watching.close()


def inotify_watches() -> int:
    """How many this process has, by the kernel's count."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += Path(f"/proc/self/fdinfo/{fd}").read_text().count("inotify wd:")
    return found


def test_one_watch_is_kept_however_many_folders_there_are(home: Home) -> None:
    """Watches are the system's, and few: what comes and goes below the inbox must take none."""
    for n in range(20):
        (home.inbox / f"{n}" / "below").mkdir(parents=True)
    before, wake = inotify_watches(), Event()
    watching = Watching(home, wake, events=True)
    try:
        assert watching.look() is None
        assert inotify_watches() == before + 1
        (home.inbox / "later" / "below").mkdir(parents=True)
        assert wake.wait(30)
        wake.clear()
        (home.inbox / "x").touch()
        assert wake.wait(30), "what came before was dealt with by then"
        assert inotify_watches() == before + 1
    finally:
        watching.close()
    assert inotify_watches() == before


def test_an_inbox_that_may_not_be_listed_is_missing_until_it_may_be(base: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        Path(folder).chmod(0o755)
        home = make_home(Path(folder) / "home", base)
        watching = Watching(home, Event(), events=False)
        for mode, said in ((0o755, "None"), (0o311, "the inbox cannot be listed: Permission denied"), (0o755, "None")):
            home.inbox.chmod(mode)
            assert as_nobody(lambda: str(watching.look())) == said


class Denied:
    """From its nth access on, the inbox may not be listed or opened `times` times over."""

    def __init__(self, inbox: Path, nth: int, times: int, patch: pytest.MonkeyPatch) -> None:
        self.accesses = 0
        for name in ("open", "listdir", "scandir"):
            real = getattr(os, name)

            def access(path: Any, *args: Any, real: Any = real, **more: Any) -> Any:
                if path == inbox:
                    self.accesses += 1
                    if nth <= self.accesses < nth + times:
                        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return real(path, *args, **more)

            patch.setattr(os, name, access)


class UntilEmpty(Service):
    """A daemon that stops once its inbox is empty."""

    def __init__(self, home: Home) -> None:
        super().__init__(home, quick(inbox={"scan_seconds": 0.01}))
        self.missing: list[str] = []

    def _look(self, watching: Watching) -> str | None:
        why = super()._look(watching)
        self.missing += [why] if why else []
        assert bool(why) == any(one.reason == "no_inbox" for one in self._health._notes.values())
        return why

    def _show_inbox(self, found: Scan) -> None:
        if not found.settled and experts(self._home):
            self._stopping.ask()


def test_wherever_the_inbox_is_closed_to_the_daemon_it_goes_on_once_it_is_open(
    home: Home, base: Path, tmp_path: Path
) -> None:
    missing = 0
    for nth in count(1):
        other = Home(shutil.copytree(home.root, tmp_path / f"{nth}", symlinks=True))
        put(other, write_expert(tmp_path / "x.safetensors", base, 2))
        with pytest.MonkeyPatch.context() as patch:
            denied = Denied(other.inbox, nth, 2, patch)
            daemon = UntilEmpty(other)
            daemon.run(http=False)
        assert [(one.status, bool(one.place)) for one in experts(other)] == [(Status.MERGED, True)]
        assert not daemon._health._notes and not os.listdir(other.inbox)
        missing += set(daemon.missing) == {"the inbox cannot be listed: Permission denied"}
        if denied.accesses < nth:
            break
    assert nth > 4 and missing > 2
