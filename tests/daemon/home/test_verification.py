"""`mainstem verify` beside a daemon that merges, publishes and collects: what it sees half done is no damage."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from daemon.compute.progress import Progress
from daemon.disk.failpoints import hit
from daemon.home.verification import verify
from daemon.layout import STATE_FILE, Home
from daemon.merge.merger import Merger
from registry.records import Expert
from registry.store import Store
from tests.daemon.arrivals.test_queue import scan
from tests.daemon.following import commands_in, run
from tests.daemon.homes import drain, experts, lineage, live, make_home, put, quick
from tests.daemon.processes import forked
from tests.models import write_expert

ONLY_THE_NEWEST = quick(retention={"versions": 1, "grace_seconds": 0})


@pytest.fixture
def home(base: Path, tmp_path: Path) -> Home:
    """A home that has merged one expert into two heads, one of which keeps records for views."""
    home = make_home(tmp_path / "home", base, [("main", "mean", {}), ("seen", "emr", {})])
    with merging(home) as merger:
        take(home, merger, base, 2)
    return home


@contextmanager
def merging(home: Home) -> Iterator[Merger]:
    with Store.open(home.registry) as store:
        merger = Merger(home, store, ONLY_THE_NEWEST, Progress(Event(), lambda share: None))
        try:
            yield merger
        finally:
            merger.close()


def take(home: Home, merger: Merger, base: Path, seed: int) -> Expert:
    put(home, write_expert(home.root / f"{seed}.safetensors", base, seed))
    (drop,) = scan(home).settled
    return merger.take(drop)


def test_at_every_point_of_publishing(home: Home, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    wrong: list[tuple[str, list[str]]] = []
    with merging(home) as merger, lineage(home) as reader:

        def look(point: str) -> None:
            if passed or point == "publish.before":  # before that all is in state/tmp
                passed.append(point)
                if found := verify(home, reader, lambda what: None)[1]:
                    wrong.append((point, found))

        for name, module in list(sys.modules.items()):
            if name.startswith("daemon.") and getattr(module, "hit", None) is hit:
                monkeypatch.setattr(module, "hit", look)
        take(home, merger, base, 3)
    assert wrong == [] and live(home) == 2
    assert {"rename", "publish.after", "commit.after", "latest.half", "archive.after", "remove"} <= set(passed)


def test_while_versions_come_and_go(home: Home, base: Path) -> None:
    """Whatever it is about to look at, by then there is a newer version, and the one before is gone."""
    said: list[str] = []
    with merging(home) as merger, lineage(home) as reader:

        def merge(what: str) -> None:
            said.append(what)
            take(home, merger, base, 10 + len(said))

        assert verify(home, reader, merge)[1] == []
    assert live(home) == 1 + len(said) and not home.version("main", 1).exists()
    assert {"the registry", "the base", "main/1", "seen/1"} & set(said)


def test_beside_a_daemon_damage_is_found_all_the_same(home: Home, base: Path) -> None:
    with merging(home) as merger, lineage(home) as reader:

        def merge(what: str) -> None:
            if what == "main/0":
                take(home, merger, base, 3)
                (home.version("main", 2) / "model.safetensors").write_bytes(b"")
                home.archived(1).write_bytes(b"")  # type: ignore[union-attr]

        found = verify(home, reader, merge)[1]
    assert [problem.split(":")[0] for problem in found] == ["archive/000001"]


@pytest.mark.parametrize("method", ["mean", "opcm"])
def test_damage_in_the_archive_is_settled_as_the_hints_say(base: Path, tmp_path: Path, method: str) -> None:
    """Of two merged ones, and of one that was withdrawn before: afterwards nothing is wrong any more."""
    home = make_home(tmp_path / "a home", base, [("main", method, {})])
    for seed in (1, 2, 3, 4):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
        drain(home)
    root = shlex.quote(str(home.root))
    run(f"mainstem rebuild --home {root} --without 1")
    for expert in (1, 2, 3):
        flip(home.archived(expert))  # type: ignore[arg-type]
    with lineage(home) as reader:
        checked, found = verify(home, reader, lambda _: None)
    assert [problem.split(":")[0] for problem in found] == [f"archive/00000{n}" for n in (3, 2, 1)]
    merged, *others = checked.hints
    in_place, away, beside = commands_in(merged)
    assert beside == f"mainstem rebuild --home {root} --into NEWHOME --without 3 --without 2"
    for command in (in_place, away, *(command for hint in others for command in commands_in(hint))):
        run(command)
    with lineage(home) as reader:
        assert verify(home, reader, lambda _: None)[1] == []
    assert [expert.id for expert in experts(home) if expert.status == "merged"] == [4]
    assert all(list((tmp_path / f"a home-00000{n}").iterdir()) for n in (1, 2, 3))


def test_an_older_version_is_put_right_as_its_hint_says_and_not_promised_where_none_makes_it(
    base: Path, tmp_path: Path
) -> None:
    """Of a pinned one, which a rebuild's own retention would take; then an expert is taken out that it had."""
    home, pinned = make_home(tmp_path / "home", base), "main/1"
    put(home, write_expert(tmp_path / "1.safetensors", base, 1))
    drain(home)
    run(f"mainstem pin {pinned} --home {home.root}")
    for seed in (2, 3):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
        drain(home, ONLY_THE_NEWEST)
    spoilt = [home.version("main", 1) / "model.safetensors", home.head_state("main", 1) / STATE_FILE]
    for path in spoilt:
        flip(path)

    def hint() -> str:
        with lineage(home) as reader:
            (said,) = verify(home, reader, lambda _: None)[0].hints
        return said

    found = re.search(r"`(MAINSTEM_RETENTION__VERSIONS)=(3) mainstem (rebuild .*) NEWHOME`", hint())
    assert found, hint()
    assert "remove state/heads/main/000001," in hint()
    new = Home(tmp_path / "new")
    os.environ[found[1]] = found[2]
    try:
        done = forked(*found[3].split(), new.root)
    finally:
        del os.environ[found[1]]
    assert done.returncode == 0, done.stderr
    run(f"mainstem rebuild --home {home.root} --without 3")
    assert "MAINSTEM_RETENTION__VERSIONS=2" in hint(), "it came later"
    run(f"mainstem rebuild --home {home.root} --without 1")
    assert "no rebuild makes it again" in hint() and "NEWHOME" not in hint()
    shutil.copy(new.version("main", 1) / "model.safetensors", spoilt[0])
    shutil.rmtree(spoilt[1].parent)
    with lineage(home) as reader:
        assert verify(home, reader, lambda _: None)[1] == []


def flip(path: Path) -> None:
    """Another last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
