"""`mainstem prune`: what goes, what is said to be lost, and what stays whatever is asked for."""

import json
import os
import shutil
import sqlite3
from dataclasses import asdict
from pathlib import Path
from threading import Event

import pytest

from daemon.compute.progress import Abandoned
from daemon.errors import BadHome
from daemon.home.verification import verify
from daemon.interventions.deeds import Request
from daemon.interventions.pruning import Prune, going, pruned, remove
from daemon.interventions.requests import _read
from daemon.interventions.waiting import answer_waiting
from daemon.layout import Home
from daemon.versions.retention import check_removable
from registry.records import Deed, NewIntervention
from registry.store import Store
from tests.daemon.homes import drain, lineage, make_home, put, quick
from tests.daemon.processes import forked
from tests.daemon.rebuilds import refused
from tests.models import write_base, write_expert
from tests.nobody import NOBODY, as_nobody

ALL = Prune(archive=True, quarantine=True, older_than=0)
UNREAD = Prune(archive=True, quarantine=True)
BY_ADA = NewIntervention(Deed.PRUNE, "ada")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """1 and 2 merged, 3 a duplicate of 1 in a folder with notes, 4 refused, 5 refused and looked after since."""
    root = tmp_path_factory.mktemp("prune")
    base = write_base(root / "base.safetensors", seed=1)
    home = make_home(root / "home", base)
    put(home, write_expert(root / "1.safetensors", base, 2))
    put(home, write_expert(root / "2", base, 3), "two")
    drain(home)
    (root / "again").mkdir()
    shutil.copy(home.archive(1) / "1.safetensors", root / "again" / "model.safetensors")
    (root / "again" / "notes.txt").write_text("notes")
    put(home, root / "again")
    drain(home)
    for name in ("bad.safetensors", "late.safetensors"):
        (home.inbox / name).write_bytes(b"no tensors")
        drain(home)
    put(home, write_expert(root / "3.safetensors", base, 4), "late.safetensors")
    drain(home)
    return home


@pytest.fixture
def home(made: Home, tmp_path: Path) -> Home:
    return Home(shutil.copytree(made.root, tmp_path / "home", symlinks=True))


def ids(home: Home, wanted: Prune) -> list[int]:
    with lineage(home) as reader:
        return [one.expert.id for one in going(home, reader, wanted)]


def test_what_is_chosen(home: Home) -> None:
    assert ids(home, UNREAD) == [3, 5], "duplicates and closed cases, and no case that is open"
    assert ids(home, ALL) == [1, 2, 3, 6, 4, 5]
    assert ids(home, Prune(archive=True, quarantine=False, older_than=0)) == [1, 2, 3, 6]
    assert ids(home, Prune(archive=False, quarantine=True, older_than=3600)) == []
    assert ids(home, Prune(archive=True, quarantine=True, larger_than=1000)) == [1, 2, 6]
    (home.archive(99)).mkdir()
    (home.root / "archive" / "000001.mine").write_text("somebody's")
    assert ids(home, ALL) == [1, 2, 3, 6, 4, 5]


def test_what_a_crash_could_need_stays(home: Home) -> None:
    with sqlite3.connect(home.registry) as raw:
        raw.execute("UPDATE experts SET place = NULL WHERE id = 2")
    raw.close()
    assert 2 not in ids(home, ALL)
    home.rebuilding("soup").mkdir()
    with pytest.raises(BadHome, match="has been begun, in state/rebuild-soup"):
        ids(home, ALL)
    assert ids(home, UNREAD) == [3, 5]


@pytest.mark.parametrize("mode", [0o555, 0o700])
def test_a_folder_of_another_user_stops_it_before_anything_is_done(home: Home, mode: int) -> None:
    """Also one that cannot even be listed."""
    deep = home.archive(2) / "two" / "deep"
    (deep / "er").mkdir(parents=True)
    for folder in [home.root, *home.root.parents]:
        folder.chmod(folder.stat().st_mode | 0o755)
    if os.geteuid() == 0:
        os.chown(home.archive(2), NOBODY, NOBODY)
        os.chown(home.archive(2) / "two", NOBODY, NOBODY)
    deep.chmod(mode if os.geteuid() == 0 else mode & 0o555)

    def asked() -> str:
        try:
            check_removable(home.archive(2))
            return "nothing"
        except BadHome as error:
            return str(error)

    assert as_nobody(asked) == f"{deep} belongs to another user, and cannot be emptied"
    deep.chmod(0o755)


def test_what_goes_is_lost_for_a_rebuild_and_nothing_else_changes(home: Home) -> None:
    done = forked("prune", home.root, "--older-than", "0d", "--dry-run")
    assert done.stdout.startswith("nothing was done; this would go:\narchive/000001: 1.safetensors (merged), ")
    assert len(os.listdir(home.root / "archive")) == 4
    said = forked("prune", home.root, "--older-than", "0d", "--reason", "full").stdout
    assert "lost: 3 merged experts stay in the models" in said and "lost: 1 refused expert" in said
    assert os.listdir(home.root / "archive") == os.listdir(home.root / "quarantine") == []
    assert forked("prune", home.root, "--older-than", "0d").stdout == "nothing is to be pruned\n"
    with lineage(home) as reader:
        assert verify(home, reader, lambda _: None)[1] == []
        assert pruned(reader) == {1, 2, 3, 4, 6} and reader.count_open() == 0
        assert {one.why for one in reader.interventions()} == {"full"}
    said = refused(home, "--into", home.root.parent / "other")
    assert "pruned or taken away" in said and "1 (1.safetensors), 2 (two)" in said
    assert "--without 1 --without 2" in said
    drain(home)  # a start finds nothing amiss


class _Asked:
    wanted = True
    request = Request(Deed.PRUNE, "ada", prune=ALL)


class _Desk:
    def __init__(self) -> None:
        self.waiting = [_Asked()]
        self.told: list[str] = []

    def tell(self, _: object, lines: list[str]) -> None:
        self.told.extend(lines)


class _Looked(Event):
    """Counts how often somebody looks whether to stop, and says so from one time on."""

    def __init__(self, until: float) -> None:
        super().__init__()
        self.left = until

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_a_daemon_does_it_between_two_arrivals(home: Home) -> None:
    """By its own hands: what is asked for goes through the file and back."""
    path = home.state / "asked.json"
    request = Request(Deed.PRUNE, "ada", prune=ALL)
    path.write_text(json.dumps(asdict(request)))
    assert _read(path) == request
    with Store.open(home.registry) as store:
        desk = _Desk()
        answer_waiting(home, store, quick(), desk, Event())  # type: ignore[arg-type]
        assert any(line.startswith("6 in all, ") for line in desk.told)
        assert remove(home, store, ALL, BY_ADA) == []


def test_a_daemon_that_prunes_thousands_does_not_look_hung_and_stops_when_told(home: Home) -> None:
    """There are six: each is looked at, checked and removed, and before each the loop shows that it goes on."""
    looked, stopped = _Looked(1000), _Looked(15)
    with Store.open(home.registry) as store:
        with pytest.raises(Abandoned):
            answer_waiting(home, store, quick(), _Desk(), stopped)  # type: ignore[arg-type]
        assert 0 < len(going(home, store, ALL)) < 6
        answer_waiting(home, store, quick(), _Desk(), looked)  # type: ignore[arg-type]
        assert 1000 - looked.left == 3 * 4 and going(home, store, ALL) == []


@pytest.mark.parametrize(
    ("option", "words"), [("--older-than", "soon"), ("--older-than", "99999999w"), ("--larger-than", "huge")]
)
def test_what_cannot_be_read_is_said(home: Home, option: str, words: str) -> None:
    done = forked("prune", home.root, option, words)
    assert done.returncode == 2 and option in done.stderr
