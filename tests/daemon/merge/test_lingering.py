"""What stays in the inbox: it is told, nothing of it is lost, and it is looked at again once something changes."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Event

import pytest

from daemon.arrivals import copying, filing
from daemon.arrivals.inbox import Inbox
from daemon.arrivals.stuck import stays_hint
from daemon.compute.progress import Abandoned, Progress
from daemon.disk import durable
from daemon.home.health import Health
from daemon.home.recovery import recover
from daemon.layout import Home
from daemon.merge.lingering import Lingering
from daemon.merge.merger import Merger
from projector.watch import SILENT, Watch
from registry.records import Status
from registry.store import Store
from tests.daemon.homes import drain, experts, live, put, quick, tree
from tests.models import WEIGHTS, write_expert

RESUMED = quick(inbox={"resume_seconds": 3600})


def test_a_download_under_way_is_left_and_the_others_are_merged(home: Home, base: Path, tmp_path: Path) -> None:
    whole = write_expert(tmp_path / "x.safetensors", base, 2)
    data = whole.read_bytes()
    (home.inbox / whole.name).write_bytes(data[: len(data) // 3] + bytes(len(data) - len(data) // 3))
    (home.inbox / f"{whole.name}.aria2").touch()
    hub = put(home, write_expert(tmp_path / "hub", base, 3))
    part = hub / ".cache" / "huggingface" / "download" / "q1w2e3.abcdef.incomplete"
    part.parent.mkdir(parents=True)
    (hub / WEIGHTS).rename(part)
    put(home, write_expert(tmp_path / "good.safetensors", base, 4))
    before = tree(home.inbox / "hub")
    drain(home)
    assert [expert.name for expert in experts(home)] == ["good.safetensors"]
    assert set(os.listdir(home.inbox)) == {"x.safetensors", "x.safetensors.aria2", "hub"}
    assert tree(home.inbox / "hub") == before
    part.rename(hub / WEIGHTS)
    (home.inbox / whole.name).write_bytes(data)
    (home.inbox / f"{whole.name}.aria2").unlink()
    drain(home)
    assert live(home) == 3 and os.listdir(home.inbox) == []


def test_a_copy_that_stops_and_goes_on_is_merged(home: Home, base: Path, tmp_path: Path) -> None:
    data = write_expert(tmp_path / "x.safetensors", base, 2).read_bytes()
    file, folder = home.inbox / "x.safetensors", home.inbox / "y"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    file.write_bytes(data[: len(data) // 2])
    drain(home, RESUMED)
    assert experts(home) == [] and set(os.listdir(home.inbox)) == {"x.safetensors", "y"}
    with file.open("ab") as more:
        more.write(data[len(data) // 2 :])
    drain(home, RESUMED)
    assert [expert.status for expert in experts(home)] == [Status.MERGED]
    drain(home)
    assert [expert.reason for expert in experts(home)] == [None, "incomplete"]


def test_what_may_not_be_read_yet_is_waited_for(home: Home, base: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything; tests/attacks runs as somebody else")
    path = put(home, write_expert(tmp_path / "x.safetensors", base, 2))
    path.chmod(0)
    drain(home, RESUMED)
    assert experts(home) == []
    path.chmod(0o644)
    drain(home, RESUMED)
    assert [expert.status for expert in experts(home)] == [Status.MERGED]


class Stuck:
    """A home with the folder `tune` in its inbox, which cannot be moved while `held`."""

    def __init__(self, home: Home, store: Store, patch: pytest.MonkeyPatch) -> None:
        self.home, self.store, self.held = home, store, True
        self.stopping = Event()
        self.merger = Merger(home, store, quick(), Progress(self.stopping, lambda share: None))
        self.inbox = Inbox(home.inbox, 0, lambda: 0.0)
        self.lingering = Lingering(home, store, self.merger)
        self.path = home.inbox / "tune"
        for name in ("rename", "exchange"):
            self._refuse(patch, name)

    def _refuse(self, patch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(durable, name)

        def move(source: Path, target: Path) -> None:
            if self.held and source == self.path:
                raise PermissionError(errno.EACCES, "as of a folder of another user")
            real(source, target)

        patch.setattr(durable, name, move)

    def take(self) -> None:
        """Takes all that is there to be taken, as the daemon does."""
        scan = self.inbox.scan(self.lingering.decided())
        self.lingering.look(scan)
        for drop in scan.settled:
            self.merger.take(drop)

    @property
    def archived(self) -> Path:
        return self.home.archive(1) / "tune" / WEIGHTS


@pytest.fixture
def stuck(home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    put(home, write_expert(tmp_path / "tune", base, 2))
    with Store.open(home.registry) as store:
        found = Stuck(home, store, monkeypatch)
        yield found
        found.merger.close()


def test_a_copy_of_what_cannot_be_moved_shows_that_it_goes_on_and_ends_with_the_daemon(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a hundred gigabytes, which a watchdog would take for a loop that hangs, at every start anew."""
    monkeypatch.setattr(copying, "COPY_BYTES", 512)
    heard: list[int] = []

    class Hearing(Watch):
        def advance(self, nbytes: int) -> None:
            heard.append(nbytes)
            if len(heard) > 3:
                raise Abandoned

    expert = stuck.merger.decide(stuck.inbox.scan(set()).settled[0])
    with pytest.raises(Abandoned):
        filing.place(stuck.home, stuck.store, expert, Hearing())
    assert not stuck.archived.exists() and not os.listdir(stuck.home.tmp)
    assert not filing.place(stuck.home, stuck.store, expert, SILENT)
    assert stuck.archived.read_bytes() == (stuck.path / WEIGHTS).read_bytes()


def test_what_cannot_be_moved_is_copied_once_and_merged_once(stuck: Stuck) -> None:
    (stuck.path / "link").symlink_to("/etc/passwd")
    os.mkfifo(stuck.path / "fifo")
    weights = (stuck.path / WEIGHTS).read_bytes()
    for _ in range(3):
        stuck.take()
    assert [expert.status for expert in experts(stuck.home)] == [Status.MERGED]
    assert stuck.archived.read_bytes() == weights and stuck.path.exists()
    assert set(os.listdir(stuck.archived.parent)) == {WEIGHTS, "config.json"}
    assert os.listdir(stuck.home.tmp) == []
    assert "the archive has a copy" in stays_hint(stuck.home, experts(stuck.home)[0])
    assert not [one for one in Health(stuck.home).troubles(stuck.store) if one.reason == "stuck"]


def test_it_may_then_be_removed_and_nothing_is_lost(stuck: Stuck) -> None:
    """As the hint says."""
    stuck.take()
    weights = (stuck.path / WEIGHTS).read_bytes()
    stuck.take()
    shutil.rmtree(stuck.path)
    for _ in range(2):
        stuck.take()
    (expert,) = experts(stuck.home)
    assert expert.place == "archive/000001" and stuck.archived.read_bytes() == weights


def test_once_it_can_be_moved_it_is(stuck: Stuck) -> None:
    """As the hint says: its owner opens it."""
    stuck.take()
    stuck.take()
    weights = (stuck.path / WEIGHTS).read_bytes()
    stuck.held = False
    stuck.take()  # nothing about it has changed yet
    assert stuck.path.exists()
    (stuck.path / "expert.json").write_text('{"weight": 5}')  # the copy is what was merged, and stays
    stuck.path.chmod(0o777)
    stuck.take()
    assert not stuck.path.exists() and stuck.archived.read_bytes() == weights
    assert not (stuck.archived.parent / "expert.json").exists()
    assert os.listdir(stuck.home.archive(1)) == ["tune"] and os.listdir(stuck.home.tmp) == []
    assert [expert.place for expert in experts(stuck.home)] == ["archive/000001"]


def test_a_crash_at_any_point_of_that_loses_nothing(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (stuck.path / WEIGHTS).read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(copying, "_copy_file", killed)  # while it is copied
        with pytest.raises(KeyboardInterrupt):
            stuck.take()
    assert not stuck.archived.exists() and stuck.path.exists()
    recover(stuck.home, stuck.store, lambda *_, **__: None)
    assert stuck.archived.read_bytes() == weights and os.listdir(stuck.home.tmp) == []
    stuck.held = False
    with monkeypatch.context() as patch:
        patch.setattr("daemon.arrivals.filing.remove_whole", killed)  # before the original goes
        with pytest.raises(KeyboardInterrupt):
            recover(stuck.home, stuck.store, lambda *_, **__: None)
    recover(stuck.home, stuck.store, lambda *_, **__: None)
    stuck.take()
    assert [expert.status for expert in experts(stuck.home)] == [Status.MERGED]
    assert stuck.archived.read_bytes() == weights and not stuck.path.exists()


@pytest.mark.parametrize("fault", ["full", "changed"])
def test_where_there_is_no_copy_nobody_is_told_to_remove_it(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def fail(*_: object) -> None:
        if fault == "full":
            raise OSError(errno.ENOSPC, "no space left on device")
        (stuck.path / "note").write_text("laid beside it meanwhile")

    with monkeypatch.context() as patch, pytest.raises(OSError) if fault == "full" else nullcontext():
        patch.setattr(copying, "_copy_file", fail)
        stuck.take()
    assert not stuck.archived.parent.exists() and os.listdir(stuck.home.tmp) == []
    assert "do not remove it" in stays_hint(stuck.home, experts(stuck.home)[0])
    stuck.take()
    stuck.path.chmod(0o700)
    stuck.take()  # something changed: once more
    assert stuck.archived.exists()


def test_what_was_refused_is_taken_anew_once_it_is_mended_where_it_lies(stuck: Stuck) -> None:
    weights = (stuck.path / WEIGHTS).read_bytes()
    (stuck.path / WEIGHTS).write_bytes(b"PK\x03\x04 a pickle")
    for _ in range(3):
        stuck.take()
    assert [expert.status for expert in experts(stuck.home)] == [Status.QUARANTINED]
    assert "mend it where it lies" in stays_hint(stuck.home, experts(stuck.home)[0])
    stuck.path.chmod(0o777)  # what was wrong may have been that
    for _ in range(2):
        stuck.take()
    assert [expert.status for expert in experts(stuck.home)] == [Status.QUARANTINED] * 2
    (stuck.path / WEIGHTS).write_bytes(weights)
    for _ in range(2):
        stuck.take()
    assert [expert.status for expert in experts(stuck.home)] == [Status.QUARANTINED] * 2 + [Status.MERGED]


@pytest.fixture
def twice(stuck: Stuck, base: Path, tmp_path: Path) -> Stuck:
    """It was merged, and lies in the inbox once more."""
    stuck.held = False
    stuck.take()
    put(stuck.home, write_expert(tmp_path / "tune", base, 2))
    stuck.held = True
    stuck.take()
    assert [expert.status for expert in experts(stuck.home)] == [Status.MERGED, Status.DUPLICATE]
    return stuck


def test_a_duplicate_may_be_removed_while_the_archive_has_its_weights(twice: Stuck) -> None:
    """As the hint says."""
    assert "remove it: the archive has these weights" in stays_hint(twice.home, experts(twice.home)[1])
    shutil.rmtree(twice.path)
    for _ in range(3):
        twice.take()
    assert experts(twice.home)[1].place and twice.archived.exists()


def test_a_duplicate_that_is_the_only_copy_is_not_to_be_removed(twice: Stuck) -> None:
    weights = (twice.path / WEIGHTS).read_bytes()
    twice.archived.unlink()
    assert "do not remove it" in stays_hint(twice.home, experts(twice.home)[1])
    shutil.rmtree(twice.home.archive(1))
    assert "do not remove it" in stays_hint(twice.home, experts(twice.home)[1])
    twice.take()
    twice.held = False
    twice.path.chmod(0o700)  # as the hint says
    twice.take()
    assert not twice.path.exists() and twice.archived.read_bytes() == weights


def test_a_stop_is_heeded_while_a_duplicate_is_finished(twice: Stuck) -> None:
    twice.take()
    twice.held = False
    twice.path.chmod(0o700)
    twice.stopping.set()
    with pytest.raises(Abandoned):
        twice.take()
    twin = experts(twice.home)[1]
    assert twin.place is None and (twice.home.archive(2) / "tune" / WEIGHTS).exists()
    recover(twice.home, twice.store, lambda *_, **__: None)
    assert experts(twice.home)[1].place and not (twice.home.archive(2) / "tune" / WEIGHTS).exists()
