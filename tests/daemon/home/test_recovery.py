"""Recovery, step by step on homes left in known states. The crash tests find the states by crashing."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import pytest

from daemon import service
from daemon.arrivals.attempts import Attempts
from daemon.arrivals.filing import place_all
from daemon.arrivals.inbox import Drop, entry_id
from daemon.compute.progress import Progress
from daemon.disk import durable
from daemon.disk.durable import SyncFailed
from daemon.errors import BadHome
from daemon.home.recovery import mark_clean, recover
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.merge.merger import Merger
from daemon.rebuild.commands import into
from daemon.rebuild.replay import Console
from daemon.service import Service
from daemon.versions import checking
from registry.records import Expert, NewExpert, Status
from registry.store import Store
from tests.daemon.arrivals.test_queue import scan
from tests.daemon.following import commands_in, follow, run
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, live, make_home, put, quick, tree
from tests.daemon.processes import forked
from tests.models import read_weights, write_base, write_expert
from tests.nobody import NOBODY, as_nobody


@pytest.fixture
def merged(home: Home, base: Path, tmp_path: Path) -> Home:
    """A home at version 2."""
    for seed in (2, 3):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
    drain(home)
    return home


@pytest.fixture
def store(merged: Home) -> Iterator[Store]:
    with Store.open(merged.registry) as store:
        yield store


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for another user")
def test_what_another_user_made_in_tmp_stops_no_start(merged: Home) -> None:
    """A crash may have come while an expert was removed in which somebody closed a folder."""
    left, ours = merged.tmp / uuid4().hex, merged.tmp / uuid4().hex
    (left / "theirs").mkdir(parents=True)
    (left / "theirs" / "notes.txt").write_text("notes")
    ours.mkdir()
    for path in [merged.root, *merged.root.rglob("*")]:
        os.lchown(path, NOBODY, NOBODY)
    for folder in [merged.root, *merged.root.parents]:
        folder.chmod(folder.stat().st_mode | 0o755)
    os.chown(left / "theirs", 0, 0)
    (left / "theirs").chmod(0o700)

    def started() -> str:
        said: list[str] = []
        with Store.open(merged.registry) as store:
            recover(merged, store, lambda event, **_: said.append(event))
        return str(said)

    assert "what another user made in state/tmp cannot be removed" in as_nobody(started)
    assert left.exists() and not ours.exists()


def quiet(event: str, **fields: object) -> None:
    """Nobody listens."""


def sound(home: Home) -> dict[str, bytes | str]:
    """The tree less what SQLite keeps for itself."""
    return {name: content for name, content in tree(home.root).items() if not name.startswith("state/registry.sqlite")}


def test_a_sound_home_is_left_as_it_is_but_for_the_clean_mark(merged: Home, store: Store) -> None:
    before = sound(merged)
    recover(merged, store, quiet)
    assert before.pop("state/clean") == b""
    assert sound(merged) == before
    mark_clean(merged)
    assert merged.clean.exists()


def next_version(home: Home, store: Store) -> None:
    """Version 3 as a crash before its commit leaves it: whole, with a manifest that follows version 2."""
    live = store.version("main", 2)
    assert live
    shutil.copytree(home.version("main", 2), home.version("main", 3))
    path = home.manifest("main", 3)
    parent = {"version": 2, "manifest_sha256": live.manifest_sha256}
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 3, "parent": parent}))


def test_what_was_never_committed_goes(merged: Home, store: Store) -> None:
    before = sound(merged)
    temporary = merged.tmp / uuid4().hex
    (temporary / "main").mkdir(parents=True)
    (temporary / "main" / "model.safetensors").write_bytes(b"half")
    next_version(merged, store)
    shutil.copytree(merged.head_state("main", 2), merged.head_state("main", 3))
    (merged.versions("main") / ".latest.tmp").symlink_to("000003")
    (merged.versions("main") / ".LATEST.tmp").write_bytes(b"0000")
    (merged.state / ".clean.tmp").touch()
    said: list[str] = []
    recover(merged, store, lambda event, **fields: said.append(str(fields.get("path"))))
    assert sound(merged) == {name: content for name, content in before.items() if name != "state/clean"}
    assert {"published/main/000003", "state/heads/main/000003", f"state/tmp/{temporary.name}"} <= set(said)
    again = sound(merged)
    recover(merged, store, quiet)
    assert sound(merged) == again


def test_what_an_operator_keeps_beside_the_heads_stays(merged: Home, store: Store) -> None:
    (merged.published / "README").write_text("mine")
    (merged.root / "notes").mkdir()
    recover(merged, store, quiet)
    assert (merged.published / "README").exists() and (merged.root / "notes").exists()


@pytest.mark.parametrize("target", ["000001", "000009", None])
def test_latest_is_put_right(merged: Home, store: Store, target: str | None) -> None:
    merged.latest("main").unlink()
    if target:
        merged.latest("main").symlink_to(target)
    (merged.versions("main") / "LATEST").unlink()
    recover(merged, store, quiet)
    assert merged.latest("main").readlink() == Path("000002")
    assert (merged.versions("main") / "LATEST").read_text() == "000002\n"


def test_missing_folders_are_made_again(merged: Home, store: Store) -> None:
    """As a backup or a git checkout without empty folders leaves them."""
    merged.inbox.rmdir()
    merged.tmp.rmdir()
    recover(merged, store, quiet)
    assert merged.inbox.is_dir() and merged.tmp.is_dir()


def _recorded(merged: Home, store: Store, name: str, status: Status) -> None:
    """An expert whose fate is in the registry while it is still in the inbox, as a crash leaves it."""
    path = merged.inbox / name
    path.write_bytes(b"whatever")
    row = NewExpert(
        name=name,
        kind="unknown",
        sha256=None,
        size_bytes=8,
        status=status,
        received_at=experts(merged)[0].received_at,
        entry=entry_id(path),
        reason="pickle" if status is Status.QUARANTINED else None,
        detail="it is a pickle",
        hint="do not",
    )
    store.record(row)


@pytest.mark.parametrize("renamed", [False, True])
def test_an_unfinished_move_is_finished_whatever_the_drop_is_called_now(
    merged: Home, store: Store, renamed: bool
) -> None:
    _recorded(merged, store, "bad.pt", Status.QUARANTINED)
    (merged.inbox / "bystander").write_bytes(b"another")
    name = "worse.pt" if renamed else "bad.pt"
    (merged.inbox / "bad.pt").rename(merged.inbox / name)
    recover(merged, store, quiet)
    assert os.listdir(merged.inbox) == ["bystander"]
    expert = experts(merged)[-1]
    assert (merged.quarantine(expert.id) / name).read_bytes() == b"whatever"
    assert json.loads((merged.quarantine(expert.id) / "reason.json").read_bytes())["reason"] == "pickle"
    assert expert.place == "quarantine/000003" and store.unplaced() == []


def test_a_newcomer_under_the_old_name_is_not_taken_for_it(merged: Home, store: Store) -> None:
    _recorded(merged, store, "bad.pt", Status.QUARANTINED)
    (merged.inbox / "new").write_bytes(b"another")
    (merged.inbox / "new").rename(merged.inbox / "bad.pt")
    place_all(merged, store)
    assert (merged.inbox / "bad.pt").read_bytes() == b"another"
    assert store.unplaced() == []


def _spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda home: _spoil(home.version("main", 2) / "model.safetensors"), "model.safetensors"),
        (lambda home: _spoil(home.head_state("main", 2) / "state.safetensors"), "state.safetensors"),
        (lambda home: _spoil(home.manifest("main", 2)), "manifest.json"),
        (lambda home: shutil.rmtree(home.version("main", 2)), "manifest.json"),
    ],
)
def test_a_damaged_live_version_stops_the_start_and_nothing_is_rolled_back(
    merged: Home, store: Store, damage: Callable[[Home], object], named: str
) -> None:
    damage(merged)
    merged.clean.unlink()
    before = sound(merged)
    with pytest.raises(BadHome, match=f"main/2 is damaged.*{named}") as refused:
        recover(merged, store, quiet)
    assert "backup" in refused.value.hint
    assert sound(merged) == before and live(merged) == 2


def test_what_is_advised_for_a_damaged_version_makes_a_sound_home(merged: Home, tmp_path: Path) -> None:
    weights = read_weights(merged.version("main", 2))
    _spoil(merged.version("main", 2) / "model.safetensors")
    merged.clean.unlink()
    with pytest.raises(BadHome, match="main/2 is damaged") as refused:
        drain(merged)
    verified = forked("verify", merged.root)
    assert verified.returncode == 1
    for n, hint in enumerate((refused.value.hint, verified.stdout)):
        command = re.search(r"mainstem (rebuild .*?--into NEWHOME)", hint)
        assert command, hint
        done = forked(*command[1].replace("NEWHOME", str(tmp_path / f"new{n}")).split())
        assert done.returncode == 0, done.stderr
        new = Home(tmp_path / f"new{n}")
        drain(new)
        assert live(new) == 2 and forked("verify", new.root).returncode == 0
        assert_close(latest(new), weights)


def test_after_a_clean_stop_the_hashing_is_left_out(merged: Home, store: Store) -> None:
    """The price of a quick start: `mainstem verify` still finds it."""
    _spoil(merged.version("main", 2) / "model.safetensors")
    recover(merged, store, quiet)


@pytest.mark.parametrize("what", ["folder", "deep", "link", "file"])
def test_where_uploads_lay_once_is_cleared_and_nothing_else(
    merged: Home, store: Store, tmp_path: Path, what: str
) -> None:
    """Others may write there: neither a link nor what cannot be removed does harm or stops a start."""
    if what == "link":
        merged.old_uploads.symlink_to(merged.state)
    elif what == "file":
        merged.old_uploads.write_bytes(b"")
    else:
        merged.old_uploads.mkdir()
        (merged.old_uploads / "link").symlink_to(merged.state)
    if what == "deep":  # deeper than the library goes
        folder = os.open(merged.old_uploads, os.O_RDONLY)
        for _ in range(3000):
            os.mkdir("d", dir_fd=folder)
            below = os.open("d", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = below
        os.close(folder)
    before = {name: content for name, content in tree(merged.state).items() if "registry" not in name}
    recover(merged, store, quiet)
    assert os.path.lexists(merged.old_uploads) == (what == "deep")
    after = {name: content for name, content in tree(merged.state).items() if "registry" not in name}
    assert after.keys() == before.keys() - {"clean"}
    if what == "deep":
        subprocess.run(["rm", "-rf", merged.old_uploads], check=True)  # for pytest, which goes no deeper


def test_sigterm_while_the_live_version_is_hashed_ends_at_the_next_piece(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, write_expert(tmp_path / "a.safetensors", base, 2))
    drain(home)
    home.clean.unlink()
    put(home, write_expert(tmp_path / "b.safetensors", base, 3))
    monkeypatch.setattr(checking, "HASH_BYTES", 100)
    pieces = []

    class Told(Progress):
        def advance(self, nbytes: int) -> None:
            pieces.append(nbytes)
            if len(pieces) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            super().advance(nbytes)

    monkeypatch.setattr(service, "Progress", Told)
    drain(home)
    assert len(pieces) <= 4 and not home.clean.exists()
    assert len(experts(home)) == 1
    monkeypatch.undo()
    drain(home)
    assert len(experts(home)) == 2 and home.clean.exists()


def archived(home: Home, expert: Expert) -> bool:
    folder = home.archive(expert.id)
    return expert.place == f"archive/{folder.name}" and (folder / expert.name).exists()


def test_a_merged_expert_whose_inbox_was_replaced_is_not_filed_as_archived(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor lost: it is filed once the old folder is back, also under a daemon that runs on."""
    away, other = home.root / "inbox.old", home.root / "inbox.new"
    put(home, write_expert(tmp_path / "first.safetensors", base, 2))
    later = write_expert(tmp_path / "later.safetensors", base, 3)

    decided = Attempts.decided

    def replaced(attempts: Attempts, drop: Drop, *how: Any) -> Expert:
        expert = decided(attempts, drop, *how)
        if drop.name == "first.safetensors":
            home.inbox.rename(away)
            home.inbox.mkdir()
            put(home, later)
        return expert

    monkeypatch.setattr(Attempts, "decided", replaced)

    class Replaced(Service):
        def _tell(self, expert: Expert, *others: object) -> None:
            super()._tell(expert, *others)  # type: ignore[arg-type]
            if expert.name == "later.safetensors":
                first, second = experts(home)
                assert (first.status, first.place, archived(home, second)) == (Status.MERGED, None, True)
                home.inbox.rename(other)
                away.rename(home.inbox)

    Replaced(home, quick()).run(once=True, http=False)
    assert [archived(home, expert) for expert in experts(home)] == [True, True] and not os.listdir(home.inbox)


@pytest.mark.parametrize("how", ["a copy is dropped", "it is filed by hand"])
def test_a_merged_expert_that_was_lost_with_its_inbox_gets_its_place(
    how: str, home: Home, base: Path, tmp_path: Path
) -> None:
    """As whoever finds the old inbox is likely to do, or as the hints say."""
    path = put(home, write_expert(tmp_path / "first.safetensors", base, 2))
    copy = Path(shutil.copy(path, tmp_path / "copy.safetensors"))
    with Store.open(home.registry) as store:
        running = Merger(home, store, quick(), Console().progress())
        (drop,) = scan(home).settled
        expert = running.decide(drop)
        home.inbox.rename(home.root / "inbox.old")
        home.inbox.mkdir()
        assert not running.tidy(expert)
        running.close()
    with pytest.raises(BadHome) as refused:
        into(home, Home(tmp_path / "other"), quick(), None, [], Console())
    assert str(home.archive(1)) in refused.value.hint
    if how == "a copy is dropped":
        put(home, copy)
        drain(home)
    else:
        shutil.move(home.root / "inbox.old" / "first.safetensors", home.archive(1))
    into(home, Home(tmp_path / "other"), quick(), None, [], Console())
    drain(home)
    assert experts(home)[0].place == "archive/000001" and live(Home(tmp_path / "other")) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [_spoil, Path.unlink], ids=["edited", "lost"])
def test_what_was_edited_of_version_0_is_put_back_as_the_hint_says(
    name: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    home = make_home(tmp_path / "a home", write_base(tmp_path / "base", 1))
    damage(home.version("main", 0) / name)
    (home.version("main", 0) / "notes").touch()
    home.clean.unlink(missing_ok=True)
    hints = []
    with lineage(home) as reader:
        checked, found = verify(home, reader, lambda _: None)
        assert len(found) == 2
        hints += checked.hints
    with Store.open(home.registry) as store, pytest.raises(BadHome) as refused:
        recover(home, store, quiet)
    hints.append(refused.value.hint)
    commands = [commands_in(hint) for hint in hints]
    assert len(commands[0]) == 1 and commands[0] == commands[1] and "backup" not in "".join(hints)
    run(commands[0][0])
    assert "remove what is not in the manifest" in hints[0]
    (home.version("main", 0) / "notes").unlink()
    with lineage(home) as reader:
        assert verify(home, reader, lambda _: None)[1] == []


def test_what_was_edited_of_a_merged_version_comes_back_from_a_rebuild_as_the_hint_says(
    merged: Home, store: Store, tmp_path: Path
) -> None:
    other = Home(tmp_path / "other")
    spoilt = [merged.version("main", 2) / "model.safetensors", merged.head_state("main", 2) / "state.safetensors"]
    for path in spoilt:
        _spoil(path)
    merged.clean.unlink()
    with pytest.raises(BadHome, match="main/2 is damaged") as refused:
        recover(merged, store, quiet)
    assert f"mainstem rebuild --home {merged.root} --into NEWHOME" in refused.value.hint
    into(merged, other, quick(), None, [], Console())
    for path in spoilt:
        shutil.copy(other.root / path.relative_to(merged.root), path)
    recover(merged, store, quiet)
    assert verify(merged, store, lambda _: None)[1] == []


def test_what_was_edited_of_the_base_is_put_back_as_verify_says(home: Home) -> None:
    _spoil(home.base / "model.safetensors")
    with lineage(home) as reader:
        (hint,) = verify(home, reader, lambda _: None)[0].hints
        assert hint.startswith("the base: `cp ")
        follow(hint)
        assert verify(home, reader, lambda _: None)[1] == []


def test_a_base_that_is_spoilt_too_is_not_offered_for_version_0(home: Home) -> None:
    for path in (home.version("main", 0), home.base):
        _spoil(path / "model.safetensors")
    with lineage(home) as reader:
        checked, _ = verify(home, reader, lambda _: None)
    assert not any("cp " in hint for hint in checked.hints) and "backup" in checked.hints[1]


def test_a_sync_that_fails_while_it_is_being_stopped_leaves_no_clean_mark(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The move out of the inbox is not durable then, and only the next start finds out."""
    put(home, write_expert(tmp_path / "a.safetensors", base, 2))
    fsync = os.fsync

    def failing(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == str(home.inbox) and not os.listdir(home.inbox):
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(SyncFailed):
            Service(home, quick()).run(http=False)
    assert not home.clean.exists() and [one.version for one in experts(home)] == [1]
    drain(home)
    assert home.clean.exists() and experts(home)[0].place


def test_a_start_waits_for_space_unless_it_is_to_drain_once(
    merged: Home, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.close()
    plain = merged.versions("main") / "LATEST"
    plain.write_text("000001\n")  # to be put right
    full, create = Event(), durable.create

    def creating(path: Path, *args: Any, **more: Any) -> int:
        if full.is_set() and path.name == ".LATEST.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(path, *args, **more)

    class Waiting(Service):
        waits = 0

        def _show_disk(self, *, full: bool) -> None:
            super()._show_disk(full=full)
            self.waits += full
            if self.waits == 3:
                make_room()
            if not full:
                self._stopping.ask()

    make_room = full.clear
    full.set()
    monkeypatch.setattr(durable, "create", creating)
    monkeypatch.setattr(service, "DISK_FULL_WAIT_SECONDS", 0.01)
    with pytest.raises(OSError, match="No space left"):
        drain(merged)
    daemon = Waiting(merged, quick())
    daemon.run(http=False)
    assert daemon.waits == 3 and plain.read_text() == "000002\n"
    assert not daemon._health._notes, "it is over"
